"""Eight simulated CPU devices for every test, float32 products at full precision, and the golden folder."""

import gc
import os

# Small models compile far longer than they compute: without LLVM's optimisations in less than half the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

NEVER_SKIPPED = ("golden", "parity", "sharding", "real")


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(Path(__file__).parent / "golden"), help="folder of recorded cases")


def pytest_collection_modifyitems(config, items):
    """A kind of recorded case that the golden folder does not hold has no test; pytest would make a skipped one."""
    absent = [item for item in items if item.name.endswith("[NOTSET]")]
    items[:] = [item for item in items if item not in absent]
    config.hook.pytest_deselected(items=absent)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A parity, sharding, golden or real test that skips is a failure: such tests are the proof."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and any(item.get_closest_marker(name) for name in NEVER_SKIPPED):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; tests marked {', '.join(NEVER_SKIPPED)} must run"


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Compiled programs stay in memory, in maps of which Linux gives a process 65,530; then XLA aborts."""
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden(request) -> Path:
    return Path(request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def tiny_model():
    """The tiny configuration with random weights wide enough that tokens differ, and the small tokenizers."""
    import jax.numpy as jnp

    from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration
    from llamavid_jax.data.qformer_tokenizer import QFormerTokenizer
    from llamavid_jax.data.tokenize import load_tokenizer
    from llamavid_jax.models.llama_vid import abstract_params

    root = Path(__file__).parent
    config = LLaMAVIDLlavaConfig.from_yaml(root.parent / "configs" / "models" / "tiny.yaml")
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    values = [0.1 * jax.random.normal(key, leaf.shape, jnp.float32) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.map_with_path(
        lambda path, value: value + 1 if "scale" in str(path[-1]) else value, jax.tree.unflatten(structure, values)
    )
    return LLaMAVIDLlavaForConditionalGeneration(
        config,
        params,
        tokenizer=load_tokenizer(root / "golden" / "text"),
        qformer_tokenizer=QFormerTokenizer(root / "golden" / "short_video_mean" / "qformer_tokenizer"),
    )
