"""A model's parameters as it is built: what the inventory (`llamavid_jax/weights/`) is held against."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from llamavid_jax.models.llama_vid import LlamaVid


def abstract_params(config, param_dtype=jnp.float32) -> dict[str, Any]:
    """The nested dict of parameters as shapes and types; nothing is allocated."""
    model = nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0), param_dtype=param_dtype))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
