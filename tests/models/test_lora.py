"""Low-rank updates: forward, gradient, dropout, merging, and PEFT's files against the formula in torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from damage import assert_told_or_harmless
from flax import nnx
from jax.sharding import PartitionSpec
from torch_models import BAR, CONFIG, ours, reference, relative_error, token_ids

from llamavid_jax.checkpoints.adapter import load_adapter, save_adapter
from llamavid_jax.config.strict import strict
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.models import stack
from llamavid_jax.models.kv_cache import KVCache
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import LoraConfig, add_lora, merge_lora, set_dropout
from llamavid_jax.models.structure import Structure, params_of
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.parallel.sharding import param_shardings
from llamavid_jax.weights import inventory
from llamavid_jax.weights.llama import TARGETS

LORA = LoraConfig(rank=4, alpha=6, dropout=0.3)
IDS = jnp.asarray(token_ids(CONFIG, 24))


def adapted(config: LoraConfig = LORA, b_scale: float = 0.2, dtype=jnp.float32) -> LlamaVid:
    """The reference's weights with updates whose B is random, as after training."""
    model = ours(CONFIG, 0.2, dtype)
    add_lora(model.llama, config, nnx.Rngs(1))
    keys = iter(jax.random.split(jax.random.key(2), 7))
    for target in config.targets:
        part, name = TARGETS[target].split(".")
        b = getattr(getattr(model.llama.layers, part), name).lora.b
        b[...] = b_scale * jax.random.normal(next(keys), b.shape)
    return model


def logits(model: LlamaVid) -> jax.Array:
    return model.llama.logits(model.llama(model.llama.embed(IDS)))


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture(scope="module")
def base_logits():
    return np.asarray(logits(ours(CONFIG, 0.2)))


# ---- the update


@pytest.mark.parametrize("targets", [list(TARGETS), ["q", "down"]])
def test_a_new_update_changes_no_bit(targets, base_logits):
    model = adapted(LoraConfig(rank=4, targets=targets), b_scale=0)
    added = [path for path in params_of(model) if ".lora." in path]
    assert added == [f"llama.layers.{TARGETS[t]}.lora.{m}" for t in sorted(targets, key=TARGETS.get) for m in "ab"]
    np.testing.assert_array_equal(logits(model), base_logits)


def test_a_starts_uniform_in_one_over_root_of_the_inputs():
    """As in PEFT: 56 inputs, and 4 heads of 16 for the attention's output."""
    model = adapted(LoraConfig(rank=64))
    for linear, inputs in ((model.llama.layers.attn.q, 56), (model.llama.layers.attn.out, 64)):
        a = np.asarray(linear.lora.a[...])
        assert 0.95 / inputs**0.5 < np.abs(a).max() <= 1 / inputs**0.5
        assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.05)
        assert not np.array_equal(a[0], a[1])


def test_cached_decoding_uses_the_update(model):
    llama = model.llama
    _, prompt = llama.prefill(llama.embed(IDS[:, :20]))
    cache = KVCache(prompt, prompt.room(1), jnp.int32(0))
    step, _ = llama.decode(llama.embed(IDS[:, 20:21]), jnp.full(2, 20), cache)
    assert relative_error(llama.logits(step[:, 0]), logits(model)[:, 20]) < BAR


@pytest.mark.parametrize(("dtype", "bar"), [(jnp.float32, 5e-6), (jnp.bfloat16, 0.05)])
def test_merged_equals_forward(dtype, bar, base_logits):
    """Logits after two layers at scale 0.2; measured: 1.2e-6, and 0.027 in bfloat16."""
    model = adapted(dtype=dtype)
    merged = merge_lora(params_of(model), LORA)
    plain = ours(CONFIG, 0.2, dtype)
    assert merged.keys() == params_of(plain).keys()
    plain = Structure(plain).model(merged)
    assert relative_error(logits(plain), logits(model)) < bar
    assert relative_error(base_logits, logits(model)) > 0.3


def test_merged_kernels_keep_their_type(model):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(merge_lora(params, LORA))} == {jnp.dtype(jnp.bfloat16)}


# ---- training


def adapter_loss(model: LlamaVid, remat: bool, key=None):
    """The loss as a function of the updates alone, and the updates."""
    graphdef, updates, frozen = nnx.split(model, lambda path, _: "lora" in path, ...)

    def loss(updates):
        model = nnx.merge(graphdef, updates, frozen)
        if key is not None:
            set_dropout(model.llama, jax.random.split(key, len(IDS)))

        def run(ids):
            return model.llama.logits(model.llama(model.llama.embed(ids)))

        return jnp.mean(jax.nn.logsumexp((jax.checkpoint(run) if remat else run)(IDS), axis=-1))

    return loss, updates


def test_gradient_of_the_updates_alone(model):
    """Through the scan, with and without checkpointing, against a finite difference along a random direction."""
    results = []
    for remat in (False, True):
        loss, updates = adapter_loss(model, remat, jax.random.key(3))
        gradient = jax.jit(jax.grad(loss))(updates)
        assert len(jax.tree.leaves(gradient)) == 14
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
        results.append(gradient)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6), *results)
    leaves, structure = jax.tree.flatten(updates)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    way = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    slope = sum(jnp.vdot(w, g) for w, g in zip(way, jax.tree.leaves(results[0]), strict=True))

    def at(distance):
        moved = [leaf + distance * w for leaf, w in zip(leaves, way, strict=True)]
        return float(jax.jit(loss)(jax.tree.unflatten(structure, moved)))

    assert (at(1e-3) - at(-1e-3)) / 2e-3 == pytest.approx(float(slope), rel=0.02)


def test_dropout_follows_its_key(model):
    losses = {}
    for name, seed in (("off", None), ("one", 1), ("one again", 1), ("two", 2)):
        loss, updates = adapter_loss(model, False, None if seed is None else jax.random.key(seed))
        losses[name] = float(jax.jit(loss)(updates))
    assert losses["one"] == losses["one again"]
    assert len(set(losses.values())) == 3


def test_dropout_drops_inputs_at_its_rate_and_keeps_the_mean():
    """Each layer draws its own mask; zero kernels and an A, B that pass one input through make it visible."""
    model = adapted(LoraConfig(rank=1, alpha=1, dropout=0.25, targets=["down"]))
    down = model.llama.layers.mlp.down
    set_dropout(model.llama, jax.random.split(jax.random.key(0), 20000))
    down.kernel[...] = jnp.zeros_like(down.kernel[...])
    down.lora.a[...] = jnp.zeros_like(down.lora.a[...]).at[:, 0].set(1)
    down.lora.b[...] = jnp.ones_like(down.lora.b[...])
    _, seen = stack.scan(lambda layer, carry: (carry, layer(jnp.ones((20000, 88)))[:, 0]), down, 0)
    assert set(np.unique(seen)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(seen.mean(axis=1), 1, atol=0.02)
    assert 0.5 < np.mean(seen[0] == seen[1]) < 0.7  # independent masks agree at 0.75² + 0.25² of the positions


# ---- sharding


def test_updates_are_cut_as_their_kernels(model):
    shapes = {path: leaf.shape for path, leaf in params_of(model).items()}
    axes = inventory.axes(CONFIG, shapes)
    assert axes["llama.layers.attn.out.lora.a"] == ("layers", "heads", "head_dim", "rank")
    assert axes["llama.layers.attn.out.lora.b"] == ("layers", "rank", "embed")
    placed = param_shardings(params_of(model), CONFIG, make_mesh(fsdp=4, tensor=2))
    assert placed["llama.layers.attn.q.lora.a"].spec == PartitionSpec(None, "fsdp", None)
    assert placed["llama.layers.attn.q.lora.b"].spec == PartitionSpec(None, None, "tensor", None)
    with pytest.raises(CheckpointError, match=r"lora\.b is layers rank embed = \(2, 4, 56\) by its row"):
        inventory.axes(CONFIG, {**shapes, "llama.layers.mlp.down.lora.b": (2, 5, 56)})


# ---- PEFT's files


def test_round_trip_of_a_peft_folder_is_exact(model, tmp_path):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params_of(model))
        save_adapter(tmp_path, params, LORA, CONFIG, base="vicuna")
        config, loaded = load_adapter(tmp_path, CONFIG)
        assert config == LORA
        wanted = {path: leaf for path, leaf in params.items() if ".lora." in path}
        assert loaded.keys() == wanted.keys()
        for path, leaf in wanted.items():
            assert loaded[path].dtype == dtype
            np.testing.assert_array_equal(loaded[path], leaf)


@pytest.mark.parity
def test_the_file_in_torch_equals_our_logits(model, tmp_path):
    """PEFT's formula, x·Aᵀ·Bᵀ·α/r, on transformers' LLaMA.

    Measured 1.3e-6.  peft 0.21 reads our folder, and we read peft's, with the same error.
    """
    save_adapter(tmp_path, params_of(model), LORA, CONFIG)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    language_model, hooks = reference(CONFIG, 0.2).language_model, []
    assert len(tensors) == 2 * 7 * CONFIG.text_config.num_hidden_layers
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        module = language_model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        assert name.split(".")[-3] in values["target_modules"]

        def update(module, args, out, a=a, b=b):
            return out + args[0] @ a.T @ b.T * (values["lora_alpha"] / values["r"])

        hooks.append(module.register_forward_hook(update))
    try:
        wanted = language_model(input_ids=torch.tensor(np.asarray(IDS))).logits
    finally:
        for hook in hooks:
            hook.remove()
    assert relative_error(logits(model), wanted) < BAR


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora is True in adapter_config.json, which is more than LoRA"),
        ("bias", "all", "bias is 'all'"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern is"),
        ("r", 0, "lora.rank is 0"),
        ("r", 5, r"q_proj\.lora_A\.weight is \(4, 56\), but the model asks for \(5, 56\)"),
        ("lora_alpha", None, "lora.alpha is None"),
        ("lora_alpha", 1e300, r"lora.alpha is 1e\+300"),
        ("peft_type", ["LORA"], "peft_type is"),
        ("a_field_of_next_year", {"on": 1}, "a_field_of_next_year is"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', .* conversion.merge_lora"),
        ("init_lora_weights", "corda", "init_lora_weights is 'corda', .* merge it with PEFT"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_refused(field, value, message, model, tmp_path):
    save_adapter(tmp_path, params_of(model), LORA, CONFIG)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    (tmp_path / "SHA256SUMS").unlink()  # PEFT's folders have no checksums
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path, CONFIG)


def test_a_flipped_bit_of_an_adapter(model, tmp_path):
    save_adapter(tmp_path, params_of(model), LORA, CONFIG)

    def read() -> dict[str, np.ndarray]:
        config, values = load_adapter(tmp_path, CONFIG)
        return values | {"scale": np.float32(config.scale)}

    assert_told_or_harmless(tmp_path, read, least=60)


def change_tensors(folder, change):
    """Rewrites the adapter's tensors with `change(dict)` and without checksums, as another program would."""
    (folder / "SHA256SUMS").unlink()
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


LAST = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if ".layers.0." in k}, "updates 1 of 2 layers"),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 56)}, "updates lm_head, and here"),
        (lambda t: {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 56)}, "updates lm_head, and here"),
        (lambda t: t | {LAST: torch.ones(0)}, "up_proj.lora_B.weight is empty: DeepSpeed's ZeRO-3"),
        (lambda t: t | {LAST: torch.ones(88, 4, dtype=torch.bool)}, "up_proj.lora_B.weight is of bool"),
        (lambda t: t | {LAST: torch.full((88, 4), torch.nan)}, "NaN or infinite"),
        (lambda t: t | {LAST: torch.full((88, 4), torch.inf)}, "NaN or infinite"),
    ],
    ids=["layers", "head too", "head alone", "empty", "bool", "nan", "inf"],
)
def test_updates_that_do_not_fit_are_told_for_what_they_are(change, message, model, tmp_path):
    save_adapter(tmp_path, params_of(model), LORA, CONFIG)
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path, CONFIG)


def test_damaged_files_are_named(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        load_adapter(tmp_path, CONFIG)
    save_adapter(tmp_path, params_of(model), LORA, CONFIG)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged: its SHA-256"):
        load_adapter(tmp_path, CONFIG)
    (tmp_path / "SHA256SUMS").unlink()  # PEFT's folders have no checksums
    with pytest.raises(CheckpointError, match=rf"1 tensors missing \({name}\)"):
        load_adapter(tmp_path, CONFIG)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        load_adapter(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", 4.0),
        ("alpha", -1),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("targets", []),
        ("targets", ["q", "q"]),
        ("targets", ["lm_head"]),
        ("targets", "q"),
    ],
)
def test_configuration_is_checked(field, value):
    with pytest.raises(ConfigError, match=f"lora.{field} is "):
        strict(LoraConfig, {field: value}, "lora.")
