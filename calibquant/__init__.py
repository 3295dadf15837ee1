"""CalibQuant: low-bit post-training quantization of ImageNet ResNets, from one YAML."""

__version__ = "0.1.0"
