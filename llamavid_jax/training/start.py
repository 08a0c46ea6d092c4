"""What a run starts from: the model's structure, its trained and frozen parameters on the mesh, and its tokenizers.

The weights of `start.model` (or random ones from the seed) come first.  The adapter of `start.adapter` replaces some of
them, and the run's own newest checkpoint replaces the trained ones (`loop.py`).
"""

import dataclasses
import fnmatch
from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llamavid_jax import buckets
from llamavid_jax.checkpoints.adapter import is_adapter, load_adapter
from llamavid_jax.checkpoints.tokenizers import check_tokenizers, load_tokenizers
from llamavid_jax.checkpoints.weights import WEIGHTS, load_part, load_weights, parse_dtype
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import local
from llamavid_jax.models.lora import ADAPTERS, LoraConfig
from llamavid_jax.models.structure import Params, Structure, params_of
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import Tokenizer
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.fingerprints import fingerprints
from llamavid_jax.training.layout import lay_out, make_model


@dataclasses.dataclass
class Start:
    """The model of a run.  `trained` (float32) and `frozen` (in the compute dtype) are parameters by path.

    `read` has the fingerprints of the frozen parameters as read, before quantisation; it is empty for random ones.
    """

    config: LLaMAVIDLlavaConfig
    structure: Structure
    trained: Params
    frozen: Params
    tokenizer: Tokenizer
    qformer_tokenizer: QFormerTokenizer
    mesh: Mesh
    read: dict[str, int]

    @property
    def params(self) -> Params:
        return self.trained | self.frozen


def with_adapter(params: Params, adapter: str) -> Params:
    """`params` updated with those in a run's `adapter` folder; LoRA's updates are not among them."""
    if not adapter or (is_adapter(adapter) and not buckets.kind(local(adapter) / WEIGHTS)):
        return params
    return params | load_part(adapter, params)


def check_adapter(adapter: str) -> None:
    """Raises ConfigError if `start.adapter` is set and is not a folder."""
    if adapter and buckets.kind(local(adapter)) != "directory":
        raise ConfigError(
            f"start.adapter is {adapter}, which does not exist; run the stage that leaves it, or give "
            "another folder, or start.adapter= for none"
        )


def read_updates(folder: str, lora: LoraConfig | None, model_config: LLaMAVIDLlavaConfig) -> dict[str, np.ndarray]:
    """The LoRA updates in the folder `start.adapter`; {} if a run without LoRA wrote it.

    Raises ConfigError if `lora` is null or differs from that of the updates.
    """
    if not folder or not is_adapter(folder):
        return {}
    if lora is None:
        raise ConfigError(
            f"start.adapter is {folder}, which holds LoRA updates, but lora is null; set lora as it was there, or "
            "merge them with `python -m conversion.merge_lora BASE ADAPTER OUT` and start from OUT"
        )
    found, updates = load_adapter(folder, model_config)
    for name in ("rank", "alpha", "targets"):
        there, here = getattr(found, name), getattr(lora, name)
        if there != here and (name != "targets" or set(there) != set(here)):
            raise ConfigError(f"lora.{name} is {here}, but {there} in start.adapter, {folder}; set it so")
    return updates


def load_start(config: TrainConfig, mesh: Mesh) -> Start:
    """Loads the model and tokenizers of a run.  Raises ConfigError or CheckpointError before anything is computed."""
    source, lora = config.start, config.lora
    check_adapter(source.adapter)
    layout = lay_out(config, mesh)
    updates = read_updates(source.adapter, lora, layout.config)
    folder = config.data.tokenizer or source.model
    tokenizers = load_tokenizers(folder, layout.config)
    check_tokenizers(layout.config, *tokenizers, folder)
    if not folder or None in tokenizers:
        raise ConfigError(
            f"{folder or 'the run'} has not both tokenizers, LLaMA's and the Q-Former's; give a folder with them: "
            "start.model, or data.tokenizer"
        )
    leaves, structure = layout.trained | layout.frozen, layout.structure

    def random(paths: Container[str]) -> Params:
        def init() -> Params:
            params = params_of(make_model(layout.config, config.training, lora))
            return {path: value.astype(leaves[path].dtype) for path, value in params.items() if path in paths}

        return jax.jit(init, out_shardings={path: leaves[path].sharding for path in leaves if path in paths})()

    if source.model:
        dtype = parse_dtype(config.training.dtype)
        params = load_weights(source.model, layout.config, dtype, mesh, float32=layout.trained)
        adapters = {path for path in leaves if fnmatch.fnmatchcase(path, ADAPTERS)}
        params |= random(adapters) if adapters else {}
    else:
        params = random(leaves)
    params = with_adapter(params, source.adapter)
    params |= {
        path: jax.device_put(value.astype(jnp.float32), leaves[path].sharding) for path, value in updates.items()
    }
    read = fingerprints({path: params[path] for path in layout.frozen}) if source.model else {}
    if lora and lora.base != "float":
        structure, params = quantized(structure, params, lora.base)
    trained = {path: value for path, value in params.items() if path in layout.trained}
    frozen = {path: value for path, value in params.items() if path not in layout.trained}
    return Start(layout.config, structure, trained, frozen, *tokenizers, mesh, read)


def quantized(structure: Structure, params: Params, kind: str) -> tuple[Structure, Params]:
    """The same model with LLaMA's kernels quantised (QLoRA).

    Empties `params`: each kernel is freed once it is quantised, so that memory never holds both models.
    """
    from llamavid_jax.models.quantize import quantize_base  # Qwix takes a second to import

    model = structure.model(params)
    params.clear()
    quantize_base(model.llama, kind)
    return Structure(model), params_of(model)
