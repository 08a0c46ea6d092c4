"""EVA ViT-g and LLaMA in plain PyTorch with our weights, written so that its compiler makes them fast.

They use SDPA, a static cache that is written in place, and int8 kernels with a scale for each output (which the
compiler widens inside the product).  Arrays go from JAX to PyTorch on the device itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaVisionConfig

Params = Mapping[str, Any]


def tensor(array: Any) -> torch.Tensor:
    """A copy, as JAX may reuse its buffer."""
    return torch.from_dlpack(array).clone()


def linear(kernel: Any, bias: torch.Tensor | None = None, inputs: int = 1) -> torch.nn.Linear:
    """A layer from our kernel `[*in, *out]`, which has `inputs` input axes."""
    weight = tensor(kernel).flatten(inputs).flatten(0, inputs - 1).T.contiguous()
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(weight)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.flatten())
    return layer


class Int8(torch.nn.Module):
    """A linear layer with its kernel rounded to int8."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        scale = layer.weight.float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.flatten().to(layer.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale


# ---- the vision tower


class Block(torch.nn.Module):
    def __init__(self, params: Params, layer: int, config: LLaMAVIDLlavaVisionConfig):
        super().__init__()

        def of(name: str) -> Any:
            return params[f"vision.blocks.{name}"][layer]

        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norms = torch.nn.ModuleList(
            torch.nn.LayerNorm(width, config.layer_norm_eps, device="meta") for _ in range(2)
        )
        for norm, name in zip(self.norms, ("attn_norm", "mlp_norm"), strict=True):
            norm.weight, norm.bias = (torch.nn.Parameter(tensor(of(f"{name}.{part}"))) for part in ("scale", "bias"))
        q_bias, v_bias = tensor(of("attn.q_bias")), tensor(of("attn.v_bias"))
        self.qkv = linear(of("attn.qkv.kernel"), torch.stack([q_bias, torch.zeros_like(q_bias), v_bias]))
        self.out = linear(of("attn.out.kernel"), tensor(of("attn.out.bias")), inputs=2)
        self.fc1, self.fc2 = (linear(of(f"mlp.{n}.kernel"), tensor(of(f"mlp.{n}.bias"))) for n in ("fc1", "fc2"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        seen = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv.unbind(2)))
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norms[1](x))))


class Tower(torch.nn.Module):
    """Pixels `[F, 3, H, W]` → features `[F, 1+P, E]`."""

    def __init__(self, params: Params, config: LLaMAVIDLlavaVisionConfig):
        super().__init__()
        self.kernel = torch.nn.Parameter(tensor(params["vision.patch_embed.kernel"]).permute(3, 2, 0, 1).contiguous())
        names = ("patch_embed.bias", "cls_token", "position")
        self.bias, self.cls, self.position = (torch.nn.Parameter(tensor(params[f"vision.{name}"])) for name in names)
        self.blocks = torch.nn.Sequential(*(Block(params, n, config) for n in range(config.num_hidden_layers)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = functional.conv2d(pixels, self.kernel, self.bias, stride=self.kernel.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(patches), 1, -1), patches], 1) + self.position
        return self.blocks(x)


# ---- the language model


class Layer(torch.nn.Module):
    def __init__(self, params: Params, layer: int, config: LlamaConfig):
        super().__init__()

        def of(name: str) -> Any:
            return params[f"llama.layers.{name}"][layer]

        self.q, self.k, self.v = (linear(of(f"attn.{name}.kernel")) for name in "qkv")
        self.out = linear(of("attn.out.kernel"), inputs=2)
        self.gate, self.up, self.down = (linear(of(f"mlp.{name}.kernel")) for name in ("gate", "up", "down"))
        self.attn_norm, self.mlp_norm = (
            torch.nn.Parameter(tensor(of(f"{name}.scale"))) for name in ("attn_norm", "mlp_norm")
        )
        self.size, self.eps = config.head_dim, config.rms_norm_eps
        self.is_grouped = config.num_key_value_heads < config.num_attention_heads

    def forward(self, x, rotation, cache=None, position=None):
        """The new states, and the keys and values `[B, K, T, H]`, which are written into the `cache` if given."""
        normed = functional.rms_norm(x, x.shape[-1:], self.attn_norm.to(x.dtype), self.eps)
        q, k, v = (part(normed).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = turned(q, rotation), turned(k, rotation)
        mask = None
        if cache is not None:
            k, v = (whole.index_copy_(2, position, new) for whole, new in zip(cache, (k, v), strict=True))
            mask = torch.arange(k.shape[2], device=x.device)[None] <= position[:, None]
        seen = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.is_grouped
        )
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        normed = functional.rms_norm(x, x.shape[-1:], self.mlp_norm.to(x.dtype), self.eps)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed)), (k, v)


def turned(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    cos, sin = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Llama(torch.nn.Module):
    def __init__(self, params: Params, config: LlamaConfig, remat: bool = False):
        super().__init__()
        self.embedding = torch.nn.Parameter(tensor(params["llama.embed.embedding"]))
        self.layers = torch.nn.ModuleList(Layer(params, n, config) for n in range(config.num_hidden_layers))
        self.norm = torch.nn.Parameter(tensor(params["llama.norm.scale"]))
        self.head = None if config.tie_word_embeddings else linear(params["llama.lm_head.kernel"])
        exponents = torch.arange(0, config.head_dim, 2, device=self.norm.device) / config.head_dim
        self.register_buffer("frequencies", config.rope_theta**-exponents / config.rope_factor, persistent=False)
        self.eps, self.remat = config.rms_norm_eps, remat

    def forward(self, ids, position=None, cache=None, last=False):
        """Logits, with `last` only of the last position, and the keys and values of every layer."""
        x, seen = functional.embedding(ids, self.embedding), []
        position = torch.arange(ids.shape[1], device=ids.device) if position is None else position
        angles = position[:, None] * self.frequencies
        rotation = torch.stack([angles.cos(), angles.sin()])
        for number, layer in enumerate(self.layers):
            if self.remat:
                x, _ = checkpoint(layer, x, rotation, use_reentrant=False)
            else:
                x, own = layer(x, rotation, cache and cache[number], position)
                seen.append(own)
        x = functional.rms_norm(x[:, -1:] if last else x, x.shape[-1:], self.norm.to(x.dtype), self.eps)
        return functional.linear(x, self.embedding if self.head is None else self.head.weight), seen

    def rounded(self) -> "Llama":
        """Rounds the layers' kernels to int8, in place."""
        for layer in self.layers:
            for name, part in list(layer.named_children()):
                setattr(layer, name, Int8(part))
        return self


def train_step(model: Llama, ids: torch.Tensor, compiled: Any):
    """A function that makes one step of AdamW and returns loss and gradient norm; autocast to bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits, _ = model(ids)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    loss_of = compiled(loss_of)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return step
