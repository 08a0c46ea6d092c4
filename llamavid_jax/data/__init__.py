"""The training set: records and shards, examples, rows, the plan of an epoch, the loader.  No JAX."""
