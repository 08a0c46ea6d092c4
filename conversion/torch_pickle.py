"""The pickle in a file of `torch.save`, read without running anything that it asks for.

A pickle is a program for a small stack machine that may call any Python function.  This is that machine with the
instructions alone that torch writes, whose only calls build a description of a tensor.  Every other instruction and
every other name is refused, and the error says which one it was.  Nothing is built that is larger than a small
multiple of the pickle, and dictionaries have plain keys.
"""

import io
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.errors import CheckpointError

from .stored_tensor import DTYPES

MAX_INSTRUCTIONS = 1 << 19  # 45 a tensor
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
NUMBERS_AND_TEXTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class StorageType(NamedTuple):
    dtype: np.dtype


class StorageName(NamedTuple):
    """What a pickle calls a storage, and what is in it."""

    key: str
    dtype: np.dtype


class View(NamedTuple):
    """A tensor before the place of its storage is known."""

    storage: StorageName
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_ignored: Any) -> View:
    if not (isinstance(storage, StorageName) and type(shape) is type(strides) is tuple):
        raise ValueError("a tensor has no storage or no shape")
    return View(storage, offset, shape, strides)


def _parameter(tensor: Any, *_ignored: Any) -> View:
    if not isinstance(tensor, View):
        raise ValueError("a parameter is no tensor")
    return tensor


def _ordered_dict() -> dict:
    return {}


def _size(numbers: Any) -> tuple:
    return tuple(numbers)


CALLS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
}
NAMES = {
    **CALLS,
    **{("torch", name): StorageType(DTYPES[dtype]) for name, dtype in STORAGE_DTYPES.items()},
    **{("torch", dtype): dtype for dtype in DTYPES},
}


def unpickle(stream: io.BytesIO, file: Path) -> tuple[Any, dict[str, np.dtype]]:
    """The next object of the stream, and the type of each storage that it names.

    The object is of numbers, texts, tuples, lists, dictionaries and `View`s.  Raises CheckpointError for a damaged
    pickle and for one that asks for anything else.
    """
    dtypes: dict[str, np.dtype] = {}
    try:
        return _run(stream, file, dtypes), dtypes
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything at all
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{file} is damaged or not a PyTorch checkpoint ({reason}); download it again") from None


def _run(stream: io.BytesIO, file: Path, dtypes: dict[str, np.dtype]) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, Any] = {}
    for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_INSTRUCTIONS:
            raise CheckpointError(f"{file} has a pickle of too many instructions; save the weights alone")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case name if name in NUMBERS_AND_TEXTS:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, len(stack) - int(instruction.name[-1]))))
            case "TUPLE":
                stack.append(tuple(_pop(stack, marks.pop())))
            case "APPEND" | "APPENDS":
                items = _pop(stack, marks.pop() if instruction.name == "APPENDS" else len(stack) - 1)
                _top(stack, list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _pop(stack, marks.pop() if instruction.name == "SETITEMS" else len(stack) - 2)
                keys, values = items[::2], items[1::2]
                if any(type(key) not in (str, int, float, bool) for key in keys):  # hashing a tuple may never return
                    raise ValueError("a key of a dictionary is neither text nor number")
                _top(stack, dict).update(zip(keys, values, strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1), file))
            case "STACK_GLOBAL":
                stack.append(_named(*_pop(stack, len(stack) - 2), file))
            case "REDUCE":
                function, arguments = _pop(stack, len(stack) - 2)
                if not any(function is known for known in CALLS.values()):
                    raise ValueError("it calls what is no function")
                stack.append(function(*arguments))
            case "BUILD":  # the attributes of an OrderedDict, such as the versions of a state_dict's modules
                stack.pop()
                _top(stack, dict)
            case "BINPERSID":
                storage = _storage(stack.pop(), file)
                dtypes[storage.key] = storage.dtype
                stack.append(storage)
            case name:
                raise CheckpointError(
                    f"{file} holds the pickle instruction {name}, which no tensors need; save it again"
                )
    raise ValueError("it has no end")


def _pop(stack: list[Any], height: int) -> list[Any]:
    """What lies above `height`, taken off."""
    if not 0 <= height <= len(stack):
        raise ValueError("its stack is empty")
    items = stack[height:]
    del stack[height:]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise ValueError(f"a {kind.__name__} is missing")
    return stack[-1]


def _named(module: Any, name: Any, file: Path) -> Any:
    module = "builtins" if module == "__builtin__" else module  # its name in pickles that Python 2 can read
    if (module, name) not in NAMES:
        raise CheckpointError(
            f"{file} names {module}.{name}; only tensors are read, nothing else in a pickle is run: "
            "save the weights alone, with torch.save(model.state_dict(), ...) or as .safetensors"
        )
    return NAMES[module, name]


def _storage(reference: Any, file: Path) -> StorageName:
    kind, storage_type, key, _device, _count, *view = reference
    if kind != "storage" or not isinstance(storage_type, StorageType) or any(part is not None for part in view):
        raise CheckpointError(f"{file} refers to {kind!r}, which is not a plain tensor storage; save it again")
    if not isinstance(key, str | int):
        raise ValueError("a storage has no name")
    return StorageName(str(key), storage_type.dtype)
