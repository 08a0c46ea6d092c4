"""Conversion between PyTorch checkpoints of LLaMA-VID and the project's own: the only code that may import torch."""
