"""Eight simulated CPU devices for every test, float32 products at full precision, and the golden folder."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

NEVER_SKIPPED = ("golden", "parity", "sharding", "real")


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(Path(__file__).parent / "golden"), help="folder of recorded cases")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A parity, sharding, golden or real test that skips is a failure: such tests are the proof."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and any(item.get_closest_marker(name) for name in NEVER_SKIPPED):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; tests marked {', '.join(NEVER_SKIPPED)} must run"


@pytest.fixture(scope="session")
def golden(request) -> Path:
    return Path(request.config.getoption("--golden"))
