"""PyTorch, with the models of transformers."""

from backends.torch.core import TorchBackend

BACKEND = TorchBackend
