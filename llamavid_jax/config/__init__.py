"""What a model is: `schema` the dataclasses, `strict` how they are read, `foreign` other projects' formats.  No JAX."""
