"""Programs compiled ahead of time for TPU slices that are not there: whether they fit, and what they move."""
