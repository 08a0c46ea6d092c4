import pytest


@pytest.fixture(scope="module")
def engine(tiny_model):
    """Warm, with three slots."""
    from llamavid_jax.serving.engine import Engine

    engine = Engine(tiny_model, slots=3, max_new_tokens=48)
    engine.start()
    yield engine
    engine.stop()
