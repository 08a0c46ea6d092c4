"""AdamW as the original trains with it: warm-up, cosine to zero, clipping, no decay on biases and LayerNorms.

Parameters, gradients and factors are dicts by path; the state covers the trained ones alone.
"""

import fnmatch
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llamavid_jax.training.config import OptimizerConfig
from llamavid_jax.training.trainable import matches


def learning_rate(config: OptimizerConfig, steps: int, step: Any) -> jax.Array:
    """The rate of `step` (from 0): linear from 0 over the first `warmup` of the steps, then a half cosine to 0."""
    warmup = math.ceil(config.warmup * steps)
    progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
    return config.learning_rate * jnp.where(
        step < warmup, step / max(warmup, 1), 0.5 * (1 + jnp.cos(jnp.pi * progress))
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW's direction for gradients that are already clipped; the step multiplies it by minus the learning rate."""
    return optax.chain(
        optax.scale_by_adam(*config.betas, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: {path: decays(path) for path in params}),
    )


def decays(path: str) -> bool:
    """Whether a parameter has weight decay: all but biases and the scales of LayerNorms, as in the original."""
    return not path.endswith("bias") and (path.startswith("llama.") or not path.endswith("scale"))


def lr_factors(paths: Iterable[str], config: OptimizerConfig) -> dict[str, float]:
    """Every parameter's learning-rate factor, 1 if no pattern of `lr_factors` matches; ConfigError if several do."""
    paths = list(paths)
    chosen = [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.lr_factors)]
    found = matches(chosen, config.lr_factors, "optimizer.lr_factors")
    return {path: float(found.get(path, 1.0)) for path in paths}


def clip(gradients: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """Gradients scaled so that their global norm is at most `max_norm`, and the norm before, as torch computes them."""
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * scale, gradients), norm
