"""Small tensors gain nothing from threads, and a loaded machine loses a lot to their waiting."""

import torch

torch.set_num_threads(1)
