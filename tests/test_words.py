"""Checks that no text contains codes in place of words, paths of one machine, or folders outside the repository."""

import re
import subprocess

import pytest
from paths import ROOT

FORBIDDEN = {
    # "(P7)", "(Q8, P9)", "D11: ...": rows of a list that the repository does not hold.  Other letters are allowed
    # outside brackets, for types (F32, U8) and chips (A10, L4).
    "code": r"\b[BDHMPQTV]\d{1,2}\b|\([A-Z]\d{1,2}(?:[-–, ]+[A-Z]\d{1,2})*\)|\bbehaviour (?:of )?\d+\.\d+",
    "machine path": r"(?<![\w.~$}/-])/(?:home|root|tmp|work|mnt|Users)/\w",
    "outside folder": r"(?<!\w)shared/",
}
TEXT = re.compile(
    r"\.(py|md|ya?ml|toml|sh|ipynb)$|(^|/)(Makefile|Dockerfile|commit_success\.txt|requirements[\w-]*\.txt)$"
)


def tracked() -> list[str]:
    """Text files tracked by git; without git, all text files except hidden ones."""
    git = subprocess.run(["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    everything = (str(file.relative_to(ROOT)) for file in ROOT.rglob("*") if file.is_file())
    names = [name for name in everything if name[0] != "."] if git.returncode else git.stdout.splitlines()
    return [name for name in names if TEXT.search(name) and name != "tests/test_words.py"]


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_words(kind):
    found = [
        f"{name}:{number}: {match.group()}"
        for name in tracked()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if (match := re.search(FORBIDDEN[kind], line))
    ]
    assert not found, f"{kind} where a word should stand: {found}"


@pytest.mark.parametrize(
    "kind, seen, passed",
    [
        ("code", "half to even (P7).", '"F32": "float32"'),
        ("code", "pooled (Q8, P9)", "Q8_0 of a TPU v2"),
        ("code", "# D11: at the front", "an A10, H100 or V100"),
        ("code", "(V2-V5)", "round 2 (of 4)"),
        ("code", "alone (behaviour of 1.11)", "version 1.11"),
        ("machine path", '"/home/me/llamavid"', "~/home/me, gs://bucket/tmp/x"),
        ("outside folder", "../shared/golden", "unshared/golden"),
    ],
)
def test_patterns(kind, seen, passed):
    assert re.search(FORBIDDEN[kind], seen) and not re.search(FORBIDDEN[kind], passed)
