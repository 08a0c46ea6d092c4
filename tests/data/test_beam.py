"""`map` by Beam's workers, where Beam is installed."""

import pytest

from llamavid_jax.data.beam import LOCAL, beam_map, beam_options
from llamavid_jax.errors import InputError

pytest.importorskip("apache_beam")


def doubled():
    return lambda name, number: {name: 2 * number}


def broken():
    def call(name, number):
        raise OSError(28, "No space left on device")

    return call


def refused():
    raise InputError("DIR is no model; give another")


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_in_order(mode, tmp_path):
    options = beam_options(f"{LOCAL} --direct_num_workers=3 --direct_running_mode={mode}")
    (tmp_path / "results").write_text("of a run before")
    names = [f"\udce9 {number}" for number in range(12)]
    found = beam_map(doubled, zip(names, range(12), strict=True), options, tmp_path / "results")
    assert list(found) == [{name: 2 * number} for number, name in enumerate(names)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "message"), [(broken, "No space left on device$"), (refused, "^DIR is no model")])
def test_errors_are_one_line(make, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        list(beam_map(make, [("a", 1), ("b", 2)], beam_options(LOCAL), tmp_path / "results"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_workers_that_write_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("llamavid_jax.data.beam.write_files", lambda folder, files: None)
    with pytest.raises(InputError, match="was not written by Beam's workers"):
        list(beam_map(doubled, [("a", 1)], beam_options(LOCAL), tmp_path / "results"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--runner=Nope", "Unexpected pipeline runner: Nope"),
        ("--runner=no.Such", "No module named 'no'"),
        ("--direct_num_workers=abc", "invalid int value: 'abc'"),
        ("clips", "give the pipeline's options as one text"),
    ],
)
def test_wrong_options_are_one_line(flags, message, capsys):
    with pytest.raises(InputError, match=message) as caught:
        beam_options(flags)
    assert "\n" not in str(caught.value) and capsys.readouterr().err == ""
