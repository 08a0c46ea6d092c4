"""The vision tower: frames `[F, 3, H, W]` → features `[F, P, E]`, the CLS token first if there is one.

EVA ViT-g/14 (the original's `eva_vit.py`: 39 of EVA's 40 blocks) and CLIP's ViT.  Both have learned absolute positions
and pre-norm blocks; TOWERS in `config/parts.py` lists their differences.  No norm follows the last block.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8

from llamavid_jax.attention.attention import attention
from llamavid_jax.config.parts import LLaMAVIDLlavaVisionConfig
from llamavid_jax.models import stack
from llamavid_jax.models.activation import gelu, quick_gelu
from llamavid_jax.models.spread import spread

FRAMES_AT_A_TIME = 32  # that one device sends through a block of the tower
ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


def pixels(frames: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 `[F, H, W, 3]` → normalised float32 `[F, 3, H, W]`; normalised pixels stay as they are."""
    if frames.dtype != jnp.uint8:
        return frames
    scaled = (frames.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
    return jnp.moveaxis(scaled, -1, -3)


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel, as one matmul over flattened patches."""

    def __init__(self, config: LLaMAVIDLlavaVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        side, width = config.patch_size, config.hidden_size
        init = jax.nn.initializers.truncated_normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (side, side, 3, width), param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype)) if config.tower.patch_bias else None
        self.dtype = dtype

    def __call__(self, pixels: Float[Array, "F 3 y x"]) -> Float[Array, "F P E"]:
        side = self.kernel.shape[0]
        patches = rearrange(pixels, "f c (y p) (x q) -> f (y x) p q c", p=side, q=side).astype(self.dtype)
        embedded = jnp.einsum("fnpqc,pqce->fne", patches, self.kernel.astype(self.dtype))
        return embedded if self.bias is None else embedded + self.bias.astype(self.dtype)


class Attention(nnx.Module):
    """Query, key and value have a linear layer each (CLIP), or share one without a bias for the key (EVA)."""

    def __init__(self, config: LLaMAVIDLlavaVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        width, heads = config.hidden_size, config.num_attention_heads
        linear = functools.partial(nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.separate = config.tower.key_bias
        if self.separate:
            self.q, self.k, self.v = (linear(width, (heads, width // heads)) for _ in range(3))
        else:
            self.qkv = linear(width, (3, heads, width // heads), use_bias=False)
            self.q_bias = nnx.Param(jnp.zeros((heads, width // heads), param_dtype))
            self.v_bias = nnx.Param(jnp.zeros((heads, width // heads), param_dtype))
        self.out = linear((heads, width // heads), width, axis=(-2, -1))

    def __call__(self, x: Float[Array, "F P E"]) -> Float[Array, "F P E"]:
        if self.separate:
            return self.out(attention(self.q(x), self.k(x), self.v(x)))
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)
        q, v = q + self.q_bias.astype(q.dtype), v + self.v_bias.astype(v.dtype)
        return self.out(attention(q, k, v))


class Mlp(nnx.Module):
    def __init__(self, config: LLaMAVIDLlavaVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class Block(nnx.Module):
    def __init__(self, config: LLaMAVIDLlavaVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.attn_norm, self.mlp_norm = (layer_norm(config, param_dtype, rngs) for _ in range(2))
        self.attn = Attention(config, **dtypes, rngs=rngs)
        self.mlp = Mlp(config, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "F P E"]) -> Float[Array, "F P E"]:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTower(nnx.Module):
    def __init__(self, config: LLaMAVIDLlavaVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        init = jax.nn.initializers.truncated_normal(0.02)
        self.patch_embed = PatchEmbed(config, **dtypes, rngs=rngs)
        self.cls_token = nnx.Param(init(rngs.params(), (config.hidden_size,), param_dtype))
        self.position = nnx.Param(init(rngs.params(), (1 + config.num_patches, config.hidden_size), param_dtype))
        self.blocks = stack.stack(lambda rngs: Block(config, **dtypes, rngs=rngs), config.num_hidden_layers, rngs)
        self.pre_norm = layer_norm(config, param_dtype, rngs) if config.tower.pre_norm else None
        self.post_norm = layer_norm(config, param_dtype, rngs) if config.tower.post_norm else None
        self.config, self.dtype = config, dtype

    @jax.named_scope("vision")
    def __call__(self, frames: Float[Array, "F 3 y x"] | UInt8[Array, "F y x 3"]) -> Float[Array, "F P E"]:
        """Frames, normalised or uint8 → the states after the last block that is used, not normed.

        All frames go through one block before the next, so that its weights are gathered once, however many frames
        there are.
        """
        config = self.config

        def embed(patch_embed: PatchEmbed, frames: jax.Array) -> jax.Array:
            return patch_embed(pixels(frames, config.image_mean, config.image_std))

        patches = spread(embed, self.patch_embed, frames, at_a_time=FRAMES_AT_A_TIME)
        cls = jnp.broadcast_to(self.cls_token.astype(self.dtype), (patches.shape[0], 1, patches.shape[2]))
        x = jnp.concatenate([cls, patches], axis=1) + self.position.astype(self.dtype)
        x = x if self.pre_norm is None else self.pre_norm(x).astype(self.dtype)

        def apply(block: Block, x: jax.Array) -> tuple[jax.Array, None]:
            return spread(Block.__call__, block, x, at_a_time=FRAMES_AT_A_TIME), None

        x = stack.scan(apply, stack.part(self.blocks, lambda p: p[: config.blocks_used]), x)[0]
        return x if config.has_cls else x[:, 1:]


def layer_norm(config: LLaMAVIDLlavaVisionConfig, param_dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """In float32; the variance is that of the centred values, as torch computes it."""
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )
