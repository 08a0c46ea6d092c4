"""Flips single bits anywhere in any file: each flip is either reported or harmless."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from llamavid_jax.errors import InputError

TRIALS = 100


def flips(folder: Path, seed: int = 0) -> Iterator[Path]:
    """Flips one random bit in each file in turn, at least TRIALS times in all; each file is restored afterwards."""
    files, rng = sorted(path for path in folder.rglob("*") if path.is_file()), random.Random(seed)
    for trial in range(max(TRIALS, len(files))):
        file = files[trial % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        yield file
        file.write_bytes(content)


def assert_told_or_harmless(folder: Path, read: Callable[[], Mapping[str, np.ndarray]], least: int) -> None:
    """For each flip, `read` either raises an error that names the file or its array, or returns the undamaged values.

    At least `least` flips must be reported; the others are in bytes that no reader looks at.
    """
    wanted, told = read(), 0
    for file in flips(folder):
        try:
            found = read()
        except InputError as error:
            array, *_ = (part for part in file.relative_to(folder).parts if part != "weights")
            assert array in str(error) and "\n" not in str(error), f"{file}: {error}"
            told += 1
        else:
            assert found.keys() == wanted.keys()
            for path, value in wanted.items():
                assert (found[path].dtype, found[path].tobytes()) == (value.dtype, value.tobytes()), f"{file}: {path}"
    assert told >= least, told
