"""Float networks, batch-norm folding, quantized layers and blocks, and their reconstruction units."""
