"""A model with its weights: made at random, or read from a checkpoint onto a mesh, and saved.

`inference/model.py` adds inference.
"""

import contextlib
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from llamavid_jax.checkpoints.tokenizers import check_tokenizers, load_tokenizers
from llamavid_jax.checkpoints.weights import check_params, load_weights, parse_dtype, save_weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.models.kv_cache import KINDS
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.structure import Structure, params_of
from llamavid_jax.parallel.sharding import param_shardings
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import Tokenizer
from llamavid_jax.weights import inventory

Model = TypeVar("Model")  # the class it is called on; beartype does not support typing.Self


class PretrainedModel:
    """Configuration, parameters, mesh and the two tokenizers of one checkpoint folder.

    `structure` and `params` are what the compiled functions take (`models/llama_vid.py`).
    """

    def __init__(
        self,
        config: LLaMAVIDLlavaConfig,
        params: dict[str, Any] | None = None,
        *,
        dtype: Any = "float32",
        mesh: Mesh | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        qformer_tokenizer: QFormerTokenizer | None = None,
        kv_cache: str = "float",
    ):
        """Random weights from `seed` where no `params` are given.  `kv_cache` "int8" halves the cache of decoding."""
        if kv_cache not in KINDS:
            raise ConfigError(f"kv_cache is {kv_cache!r}; use one of {', '.join(KINDS)}")
        self.config, self.mesh, self.dtype = config, mesh, parse_dtype(dtype)
        self.tokenizer, self.qformer_tokenizer = tokenizer, qformer_tokenizer

        def make() -> LlamaVid:
            types = {"dtype": self.dtype, "param_dtype": self.dtype, "kv_cache": kv_cache}
            return LlamaVid(config, rngs=nnx.Rngs(seed), **types)

        self.structure = Structure(nnx.eval_shape(make))
        if params is None:
            shardings = mesh and param_shardings(self.structure.shapes, config, mesh)
            params = jax.jit(lambda: params_of(make()), out_shardings=shardings)()
        check_params("params", params, inventory.shapes(config))
        self.params = params

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory: str | Path,
        *,
        dtype: Any = "bfloat16",
        mesh: Mesh | None = None,
        quantize: str | None = None,
        kv_cache: str = "float",
    ) -> Model:
        """Loads a converted checkpoint as `dtype`, straight onto `mesh` if given; every host reads its shards.

        `quantize` "int8" or "int4" quantises LLaMA's kernels before they reach the devices; None takes them as stored.
        `kv_cache` "int8" halves the cache of decoding.

        Raises ConfigError or CheckpointError, which name the file and the remedy.
        """
        config = LLaMAVIDLlavaConfig.from_pretrained(directory)
        config = config if quantize is None else config.quantized(quantize)
        tokenizer, qformer_tokenizer = load_tokenizers(directory, config)
        check_tokenizers(config, tokenizer, qformer_tokenizer, directory)
        params = load_weights(directory, config, dtype, mesh)
        tokenizers = {"tokenizer": tokenizer, "qformer_tokenizer": qformer_tokenizer}
        return cls(config, params, dtype=dtype, mesh=mesh, kv_cache=kv_cache, **tokenizers)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the weights, the tokenizers and `config.json`, without which the folder is no model."""
        save_weights(directory, self.params)
        for part in (self.tokenizer, self.qformer_tokenizer, self.config):
            if part is not None:
                part.save_pretrained(directory)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Puts the mesh in context, if there is one."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()
