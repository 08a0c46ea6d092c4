"""The inventory of every weight: one row gives its path, its axes, and its layout and names in PyTorch's files.

Sharding, size checks, conversion in both directions, adapters and quantised kernels all read it.  No JAX.
"""
