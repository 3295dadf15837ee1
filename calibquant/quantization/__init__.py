"""Quantization: pure arithmetic, range observers, fake quantizers and their modes.

Nothing here knows a network architecture, a config file or a device.
"""
