"""Weights, adapters and tokenizers on disk, read straight onto a mesh."""
