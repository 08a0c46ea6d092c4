"""What a model is: `schema` the dataclasses, `strict` how they are read, `foreign` the forms of others.  No JAX."""
