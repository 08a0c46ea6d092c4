"""A model's structure without its parameters.  Outside modules these are one flat dict: dotted path → array.

{"llama.layers.attn.q.kernel": [L, D, N, H], ...}  ─ structure.model(params) ─▶  LlamaVid
"""

from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]  # arrays by dotted path


def flat_paths(tree: Any) -> dict[str, Any]:
    """`{"llama.norm.scale": leaf}` of an nnx state, a nested dict or another tree."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): leaf
        for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }


def params_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters of a module, arrays or shapes."""
    return flat_paths(nnx.state(model, nnx.Param))


class Structure:
    """What is left of a model when its parameters are taken out.  `shapes`: path → jax.ShapeDtypeStruct, in order.

    Hashable, so that jitted functions take it as a static argument: one program serves all models of one structure.
    """

    def __init__(self, model: nnx.Module):
        """`model` may be abstract (`nnx.eval_shape`)."""
        self._graphdef, state = nnx.split(model, nnx.Param)
        self._tree = jax.tree.structure(state)
        self.shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat_paths(state).items()}

    def model(self, *params: Params) -> Any:
        """The model with the given parameters, which together must be all of them."""
        by_path = {path: value for some in params for path, value in some.items()}
        leaves = [by_path[path] for path in self.shapes]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, leaves))

    def __hash__(self) -> int:
        return hash((self._graphdef, self._tree))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and (self._graphdef, self._tree) == (other._graphdef, other._tree)
