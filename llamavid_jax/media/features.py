"""Precomputed features of a video, from the vision tower: file -> frames [P, E] float, one by one.

    .safetensors  a feature file (`feature_file.py`), with a description and checksums;
                  or any other with a tensor `feats` (or `features`) [F, P, E], and `inputs` in its metadata
    .npz          arrays `feats` (or `features`) and, for a movie, `inputs`: text with one <image> per frame
    .npy          the array alone
    .pkl          the original's: a dictionary of both, read without running anything (`feature_pickle.py`)

The entries of .npz have CRC-32 checksums, which are verified; .npy, .pkl and other .safetensors have none, so damage
that leaves finite numbers goes unnoticed.

P is a square number of patches, or one more with the CLS token first, which is dropped, as the original does, without
`keep_cls`.  Frames are read one after another and never all at once: an hour at one a second is 2.6 GB in 16 bits.
The first bytes tell the kind of file.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from llamavid_jax.files import LITERAL
from llamavid_jax.media.feature_file import described_frames, read_description
from llamavid_jax.media.feature_pickle import pickled_frames, read_pickle
from llamavid_jax.media.source import MediaError, local_file
from llamavid_jax.pickles import PickleError

SUFFIXES = (".npz", ".npy", ".safetensors", ".pkl", ".pickle")
NAMES = ("feats", "features")
SAFETENSORS = b"\0\0\0\0{"  # from the fifth byte on: the end of its header's length, and the header
SAFETENSORS_DTYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
REMEDY = "write it anew with numpy.savez(FILE, feats=FLOAT16_ARRAY, inputs=TEXT)"


class FeatureHeader(NamedTuple):
    """What a file says about itself.  `patches` are without CLS; `inputs` is a movie's text, None for a plain clip."""

    frames: int
    patches: int
    width: int
    inputs: str | None


class _Opened(NamedTuple):
    shape: tuple[int, ...]  # [F, P or 1+P, E]
    frames: Iterator[np.ndarray]
    inputs: str | None
    description: dict[str, Any] | None = None  # of a feature file


def is_features(path: object) -> bool:
    """Whether a file holds features, by its name."""
    return isinstance(path, str | Path) and str(path).lower().endswith(SUFFIXES)


def is_feature_file(path: Path) -> bool:
    """Whether a local file is a .safetensors, by its first bytes."""
    with path.open("rb") as opened:
        return opened.read(9)[4:] == SAFETENSORS


def read_header(path: str | Path) -> FeatureHeader:
    """Shape and text of the file, without reading its values.  Raises MediaError."""
    with _open(path) as (shape, _, inputs, _):
        return FeatureHeader(shape[0], shape[1] - _has_cls(shape[1]), shape[2], inputs)


def describe(path: str | Path) -> dict[str, Any] | None:
    """The description in a feature file (docs/features.md); None for files of other kinds.  Raises MediaError."""
    with _open(path) as opened:
        return opened.description


def processing(size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """How frames are preprocessed, for a feature file's description and for the key of a cached one."""
    return {"size": size, "mean": list(mean), "std": list(std), "aspect": "crop"}


def check_made_by(path: object, description: Mapping[str, Any], tower: str, prepared: Mapping[str, Any]) -> None:
    """Raises MediaError unless a feature file was made by the `tower` of this SHA-256 from frames `prepared` so."""
    if description["tower"].get("sha256") != tower:
        raise MediaError(f"{path} was made by another vision tower than this model's; make it again: llamavid-features")
    if description["processing"] != prepared:
        raise MediaError(
            f"{path} was made of frames that were prepared by {description['processing']}, this model takes "
            f"{prepared}; make it again: llamavid-features"
        )


def check_rate(path: object, description: Mapping[str, Any], fps: float | int) -> None:
    """Raises MediaError unless a feature file's frames were sampled at `fps` a second, as the training data's are."""
    if (rate := description["sampling"]["fps"]) != fps:
        raise MediaError(
            f"{path} holds {rate:g} frames a second, not {fps:g}; set data.fps to its rate, or make it again: "
            "llamavid-features --fps"
        )


def iter_features(path: str | Path, keep_cls: bool = False) -> Iterator[Float[np.ndarray, "P E"]]:
    """Yields each frame's patches in their stored type, int8 as float32; with `keep_cls` after its CLS token, if any.

    Raises MediaError, also for values that are not finite.
    """
    with _open(path) as (shape, frames, _, _):
        has_cls = _has_cls(shape[1]) and not keep_cls
        for number, frame in enumerate(frames):
            if not np.isfinite(frame).all():
                raise MediaError(f"{path}: frame {number} holds values that are not finite; make the features again")
            yield frame[1:] if has_cls else frame


def _has_cls(patches: int) -> bool:
    return math.isqrt(patches) ** 2 != patches


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[_Opened]:
    file = local_file(path)
    try:
        with contextlib.ExitStack() as stack:
            with file.open("rb") as opened:
                magic = opened.read(9)
            if magic[4:] == SAFETENSORS:
                found = _safetensors(path, file, stack)
            elif magic.startswith(b"PK"):
                archive = stack.enter_context(zipfile.ZipFile(file))
                _check_directory(archive)
                name = _array_name(path, [n.removesuffix(".npy") for n in archive.namelist()])
                member = stack.enter_context(archive.open(name + ".npy"))
                shape, frames = _npy_frames(path, member, archive.getinfo(name + ".npy").file_size)
                found = _Opened(shape, frames, _npz_text(path, archive))
            elif magic.startswith(b"\x93NUMPY"):
                shape, frames = _npy_frames(path, stack.enter_context(file.open("rb")), file.stat().st_size)
                found = _Opened(shape, frames, None)
            elif magic.startswith((b"\x80", b"(", b"}")):
                found = _pickle(path, stack.enter_context(file.open("rb")))
            else:
                raise ValueError("its beginning is that of no kind")
            yield found
    except MediaError:
        raise
    except PickleError as error:
        raise MediaError(
            f"{path} {error}; of a pickle only arrays and texts are read, and nothing in it is run: {REMEDY}"
        ) from None
    # A damaged file raises whatever its reader meets: BadZipFile, zlib.error, EOFError, struct.error, SafetensorError
    except Exception as error:
        raise MediaError(f"{path} is no file of features, or damaged ({error}); {REMEDY}") from None


def _check_directory(archive: zipfile.ZipFile) -> None:
    """Raises BadZipFile if damage hides an entry: CRC-32 covers only the entries' content."""
    archive.fp.seek(-22 - len(archive.comment), os.SEEK_END)
    count = int.from_bytes(archive.fp.read(12)[10:], "little")
    if count != len(archive.infolist()):
        raise zipfile.BadZipFile(f"its directory has {len(archive.infolist())} of {count} entries")
    for info in archive.infolist():
        archive.open(info).close()  # compares the two headers that name it


def _array_name(path: str | Path, names: list[str]) -> str:
    found = next((name for name in NAMES if name in names), None)
    if found is None:
        raise MediaError(f"{path} holds {', '.join(names) or 'nothing'}, but no array `feats`; {REMEDY}")
    return found


def _check(path: str | Path, shape: tuple[int, ...], kind: object) -> None:
    if kind not in SAFETENSORS_DTYPES.values():
        raise MediaError(f"{path}: the features are {kind}; float16 or float32 is needed: {REMEDY}")
    _check_shape(path, shape)


def _check_shape(path: str | Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or 0 in shape or math.isqrt(shape[1] - _has_cls(shape[1])) ** 2 != shape[1] - _has_cls(shape[1]):
        raise MediaError(
            f"{path}: the features have the shape {list(shape)}; [frames, patches, width] is needed, with a square "
            "number of patches or one more for CLS, such as 256 or 257"
        )


def _npy_frames(path: str | Path, stream: Any, size: int) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """The array in `stream`, a .npy file of `size` bytes."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with LITERAL:
        shape, by_column, dtype = read(stream)
    _check(path, shape, dtype)
    if by_column:
        raise MediaError(f"{path}: the array is stored by columns; write numpy.ascontiguousarray of it")
    length = shape[1] * shape[2] * dtype.itemsize
    if size < shape[0] * length:
        raise MediaError(f"{path} is cut short: {size} bytes of {shape[0] * length}; copy it again")

    def frames() -> Iterator[np.ndarray]:
        for number in range(shape[0]):
            data = stream.read(length)
            if number == shape[0] - 1:
                stream.read(1)  # reading to its end verifies an archive entry's CRC-32
            yield np.frombuffer(data, dtype).reshape(shape[1:])

    return shape, frames()


def _npz_text(path: str | Path, archive: zipfile.ZipFile) -> str | None:
    if "inputs.npy" not in archive.namelist():
        return None
    with archive.open("inputs.npy") as member:
        with LITERAL:
            text = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # for the CRC-32, as above
    if text.dtype.kind != "U" or text.size != 1:
        raise MediaError(f"{path}: `inputs` is an array {list(text.shape)} of {text.dtype}; one text is needed")
    return str(text.reshape(())[()])


def _pickle(path: str | Path, stream: Any) -> _Opened:
    found = read_pickle(stream, NAMES)
    _check(path, found.shape, found.dtype)
    if found.inputs is not None and not isinstance(found.inputs, str):
        raise MediaError(f"{path}: `inputs` is a {type(found.inputs).__name__}; one text is needed")
    return _Opened(found.shape, pickled_frames(stream, found), found.inputs)


def _safetensors(path: str | Path, file: Path, stack: contextlib.ExitStack) -> _Opened:
    from safetensors import safe_open

    while True:
        stream = stack.enter_context(file.open("rb"))
        opened = stack.enter_context(safe_open(file, framework="np"))
        if os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):
            break  # else another process has just replaced the file, and the two handles differ
    metadata, slices = opened.metadata() or {}, {name: opened.get_slice(name) for name in opened.offset_keys()}
    tensors = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    description = read_description(file, metadata, tensors)
    tensor = slices[_array_name(path, list(slices))]
    shape = tuple(tensor.get_shape())
    if description is not None:
        _check_shape(path, shape)
        if description["cls"] != _has_cls(shape[1]):
            raise ValueError("it says of CLS tokens what its shape does not")
        frames = described_frames(stream, description)
        stack.callback(frames.close)  # closed before the file, which its threads read
        return _Opened(shape, frames, description["inputs"], description)
    _check(path, shape, SAFETENSORS_DTYPES.get(tensor.get_dtype(), tensor.get_dtype()))
    return _Opened(shape, (tensor[i : i + 1][0] for i in range(shape[0])), metadata.get("inputs"))
