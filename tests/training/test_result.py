"""A run's results are complete or absent."""

import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.training.result import replaced


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path):
    for content in ("old", "new"):
        with replaced(tmp_path / "model") as folder:
            assert not list(folder.iterdir())
            (folder / "weights").write_text(content)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), InputError("no"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(InputError if isinstance(error, OSError) else type(error)),
        replaced(tmp_path / "model") as folder,
    ):
        (folder / "config.json").write_text("half")
        raise error
    assert [file.name for file in tmp_path.rglob("*")] == ["model"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(InputError, match="model cannot be written"), replaced(tmp_path / "model"):
        pass
