"""LoRA: low-rank updates of the LLaMA's linear layers, trained in place of their kernels.

Hu et al. 2021, with the original's setting: rank 64, α 16, dropout 0.05, every linear layer of the decoder but the
head.  `add_lora` changes the parameter tree as follows (L layers, r the rank):

    llama.layers.attn.q.kernel  [L, D, n, h]     llama.layers.attn.q.kernel  [L, D, n, h]   frozen
                                             →   llama.layers.attn.q.lora.a  [L, D, r]      trained
                                                 llama.layers.attn.q.lora.b  [L, r, n, h]   trained, starts at zero

`merge_lora` adds the products to the kernels and removes the updates.  `checkpoints/adapter.py` reads and writes the
updates alone.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from llamavid_jax.config.strict import check_fields
from llamavid_jax.errors import ConfigError
from llamavid_jax.models import stack
from llamavid_jax.models.linear import DropoutKeys, Linear, LowRank
from llamavid_jax.models.llama import Llama
from llamavid_jax.models.structure import Params
from llamavid_jax.weights.llama import TARGETS

ADAPTERS = "llama.layers.*.lora.*"  # the pattern of the parameters that `add_lora` adds


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The update is `alpha / rank · A·B`; `base` is how the frozen kernels are stored: "float", "nf4" or "int8".

    Raises ConfigError for a field out of its range.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: list = dataclasses.field(default_factory=lambda: list(TARGETS))
    base: str = "float"

    def __post_init__(self):
        check_fields(self, "lora.", own_range=["dropout"])
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; use a number from 0 to below 1")
        if self.base not in ("float", "nf4", "int8"):
            raise ConfigError(f"lora.base is {self.base!r}; use 'float', 'nf4' or 'int8'")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"lora.targets is {self.targets}; use some of {', '.join(TARGETS)}, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def linears(layers: nnx.Module, targets: Iterable[str] = TARGETS) -> Iterator[tuple[str, Linear]]:
    """Each target and its Linear, of one layer or a stack."""
    for target in targets:
        part, name = TARGETS[target].split(".")
        yield target, getattr(getattr(layers, part), name)


def add_lora(llama: Llama, config: LoraConfig, rngs: nnx.Rngs, param_dtype=jnp.float32) -> None:
    """Gives the targets of every layer an update that is zero until it is trained; its parameters in `param_dtype`."""
    for _, linear in linears(llama.layers, config.targets):

        def make(rngs: nnx.Rngs, linear=linear) -> LowRank:
            sizes = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
            dtypes = {"dtype": linear.dtype, "param_dtype": param_dtype}
            return LowRank(linear.in_features, linear.out_features, **sizes, **dtypes, rngs=rngs)

        linear.lora = stack.stack(make, llama.config.num_hidden_layers, rngs)


def set_dropout(llama: Llama, keys: Key[Array, " B"]) -> None:
    """Switches dropout on, inside a training step: every update of every layer has its own key for each row."""
    for number, (_, linear) in enumerate(linears(llama.layers)):
        if linear.lora is not None:
            places = number * llama.config.num_hidden_layers + jnp.arange(llama.config.num_hidden_layers)
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
            linear.lora.dropout_keys = DropoutKeys(fold(keys, places))


def merge_lora(params: Params, config: LoraConfig) -> Params:
    """Removes the updates from the parameters and adds them to the kernels, in float32 and cast back to their type."""
    merged = {path: value for path, value in params.items() if ".lora." not in path}
    for path in params:
        place, lora, part = path.rpartition(".lora.")
        if lora and part == "a":
            kernel = f"{place}.kernel"
            merged[kernel] = _merged(params[kernel], params[path], params[f"{place}.lora.b"], config.scale)
    return merged


@jax.jit
def _merged(
    kernel: Float[Array, " L *in_out"], a: Float[Array, " L *in r"], b: Float[Array, "L r *out"], scale
) -> Float[Array, " L *in_out"]:
    """One layer after the other, so that float32 copies are one layer large."""

    def merge(layer):
        kernel, a, b = (value.astype(jnp.float32) for value in layer)
        return (kernel + scale * jnp.tensordot(a, b, 1, precision="highest")).astype(layer[0].dtype)

    return jax.lax.map(merge, (kernel, a, b))
