"""Eight simulated CPU devices for every test, float32 matmuls at full precision, and shared fixtures."""

import atexit
import contextlib
import gc
import os
import tempfile

# Small models take far longer to compile than to run.  Without LLVM's optimisations compilation takes less than half
# the time; with XLA's older fusion emitters, without MLIR, a third of that; as one module, four fifths of that.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"

# Workers, and processes that tests start, share compiled programs in a folder that is empty at first.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the session's folder
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    atexit.register(COMPILED.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

NEVER_SKIPPED = ("golden", "parity", "sharding", "real")


def pytest_addoption(parser):
    with contextlib.suppress(ValueError):  # the plug-in in tests/golden_option, if installed, has added it
        parser.addoption("--golden", help="folder of recorded cases (tests/golden)")


def pytest_collection_modifyitems(config, items):
    """Deselects tests without any recorded case in the golden folder; pytest would skip them."""
    absent = [item for item in items if item.name.endswith("[NOTSET]")]
    items[:] = [item for item in items if item not in absent]
    config.hook.pytest_deselected(items=absent)


def pytest_collection_finish(session):
    """Exempts all imported objects from garbage collection, which then has less to search."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Makes a skipped parity, sharding, golden or real test a failure: these tests are the evidence."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and any(item.get_closest_marker(name) for name in NEVER_SKIPPED):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; tests marked {', '.join(NEVER_SKIPPED)} must run"


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops compiled programs when there are many.

    They occupy memory maps, of which Linux gives a process 65,530; beyond that XLA aborts.
    """
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden(request) -> Path:
    return Path(request.config.getoption("--golden") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def tiny_model():
    """The tiny configuration with random weights, large enough that tokens differ, and the small tokenizers."""
    import jax.numpy as jnp
    from training_cases import draw

    from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration
    from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
    from llamavid_jax.text.tokenizer import load_tokenizer
    from llamavid_jax.weights import inventory

    root = Path(__file__).parent
    config = LLaMAVIDLlavaConfig.from_yaml(root.parent / "configs" / "models" / "tiny.yaml")
    shapes = dict(sorted(inventory.shapes(config).items()))
    values = zip(shapes, draw(7, *shapes.values()), strict=True)
    params = {path: jnp.asarray(value + path.endswith("scale")) for path, value in values}
    return LLaMAVIDLlavaForConditionalGeneration(
        config,
        params,
        tokenizer=load_tokenizer(root / "golden" / "text"),
        qformer_tokenizer=QFormerTokenizer(root / "golden" / "short_video_mean" / "qformer_tokenizer"),
    )


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory) -> str:
    """The tiny model's folder; tests must not change it."""
    from llamavid_jax import LLaMAVIDLlavaImageProcessor

    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(folder)
    LLaMAVIDLlavaImageProcessor(56).save_pretrained(folder)
    return str(folder)
