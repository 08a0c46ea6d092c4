"""Programs compiled ahead of time for TPU slices that are not attached: whether they fit, and what they move."""
