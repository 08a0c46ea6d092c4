"""Images, videos and precomputed features: from a path, a URL or bytes to frames for the vision tower.  No JAX."""
