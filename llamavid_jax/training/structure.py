"""The model's structure without its parameters, which training keeps as dicts by path: trained ones and frozen ones."""

import jax
from flax import nnx

from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.parallel.sharding import flat_paths


class Structure:
    """What is left of a model when its parameters are taken out.  `shapes`: path → jax.ShapeDtypeStruct, in order."""

    def __init__(self, model: LlamaVid):
        """`model` may be abstract (`nnx.eval_shape`)."""
        self._graphdef, state = nnx.split(model, nnx.Param)
        self._tree = jax.tree.structure(state)
        self.shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat_paths(state).items()}

    def model(self, *params: dict[str, jax.Array]) -> LlamaVid:
        """The model with the given parameters, all of which must be there."""
        by_path = {path: value for some in params for path, value in some.items()}
        leaves = [by_path[path] for path in self.shapes]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, leaves))
