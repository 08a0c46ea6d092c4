"""The command: what it refuses before anything is loaded."""

import pytest

from llamavid_jax.serving.__main__ import main, parse_arguments


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--model"),
        (["--slots", "0"], "--slots is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--queue", "-1"], "--queue is -1"),
        (["--deadline", "nan"], "--deadline is nan"),
        (["--max-upload", "0"], "--max-upload is 0"),
        (["--media-root", "nowhere"], "--media-root nowhere"),
        (["--api-key", ""], "--api-key is empty"),
        ([], "nowhere"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    model = [] if words == "--model" else ["--model", "nowhere"]
    assert main([*model, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].startswith("llamavid-serve: ") and words in said


def test_names_and_keys(monkeypatch):
    monkeypatch.setenv("LLAMAVID_API_KEY", "hidden")
    options = parse_arguments(["--model", "some/folder/", "--api-key", "given"])
    assert options.name == "folder" and options.api_key == ["given", "hidden"]
