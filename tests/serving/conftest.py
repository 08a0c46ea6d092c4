import pytest
from clips import index_frame, write_clip


@pytest.fixture(scope="session")
def engine(tiny_model):
    """Warmed up, with three slots."""
    from llamavid_jax.serving.engine import Engine

    engine = Engine(tiny_model, slots=3, max_new_tokens=48)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", [index_frame(i) for i in range(100)])


@pytest.fixture(scope="module")
def server(tiny_model, engine, tmp_path_factory, clip):
    from servers import make_server

    return make_server(tiny_model, engine, tmp_path_factory.mktemp("uploads"), media_root=clip.parent)


@pytest.fixture(scope="module")
def client(server):
    from starlette.testclient import TestClient

    return TestClient(server.app, raise_server_exceptions=False)
