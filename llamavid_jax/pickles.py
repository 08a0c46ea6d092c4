"""A pickle, read without running anything that it asks for.

A pickle is a program for a small stack machine that may call any Python function.  This module is that machine with
only the instructions that arrays, texts, numbers, lists and dictionaries need.  It calls only functions in `calls`, and
resolves other names only in `values`; the reader of each kind of file supplies both.  Anything else is refused, with an
error that names it.  Nothing is built that is larger than a small multiple of the pickle, and dictionary keys are plain
values.
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llamavid_jax.errors import InputError

MAX_INSTRUCTIONS = 1 << 19
PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
PLAIN += ("BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
Names = Mapping[tuple[str, str], Any]  # by module and name


class PickleError(InputError):
    """What a pickle asked for and was refused, as the end of a sentence about its file: "names os.system"."""


def unpickle(
    stream: Any,
    calls: Names,
    values: Names,
    build: Callable[[Any, Any], None],
    storage: Callable[[Any], Any] | None = None,
) -> Any:
    """The next object of the stream.

    `build(object, state)` sets the state of an object that `calls` made; `storage` resolves a reference to something
    outside the pickle (a persistent id).  Raises PickleError, and for a damaged pickle any other exception.
    """
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, Any] = {}
    for count, (instruction, argument) in enumerate(_instructions(stream)):
        if count > MAX_INSTRUCTIONS:
            raise PickleError("has a pickle of too many instructions")
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case name if name in PLAIN:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, len(stack) - int(instruction[-1]))))
            case "TUPLE":
                stack.append(tuple(_pop(stack, marks.pop())))
            case "APPEND" | "APPENDS":
                items = _pop(stack, marks.pop() if instruction == "APPENDS" else len(stack) - 1)
                _top(stack, list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _pop(stack, marks.pop() if instruction == "SETITEMS" else len(stack) - 2)
                keys, given = items[::2], items[1::2]
                if any(type(key) not in (str, int, float, bool) for key in keys):  # hashing a tuple may never return
                    raise ValueError("a key of a dictionary is neither text nor number")
                _top(stack, dict).update(zip(keys, given, strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1), calls, values))
            case "STACK_GLOBAL":
                stack.append(_named(*_pop(stack, len(stack) - 2), calls, values))
            case "REDUCE":
                function, arguments = _pop(stack, len(stack) - 2)
                if not any(function is known for known in calls.values()):
                    raise ValueError("it calls what is no function")
                stack.append(function(*arguments))
            case "BUILD":
                state = stack.pop()
                build(stack[-1], state)
            case "BINPERSID" if storage is not None:
                stack.append(storage(stack.pop()))
            case name:
                raise PickleError(f"holds the pickle instruction {name}")


def _instructions(stream: Any) -> Iterator[tuple[str, Any]]:
    """Names and arguments, as from `pickletools.genops`, except that bytearrays are read as bytes."""
    while True:
        code = stream.read(1)
        instruction = pickletools.code2op.get(code.decode("latin-1"))
        if instruction is None:
            raise ValueError(f"{code!r} is no instruction" if code else "it has no end")
        read = instruction.arg and instruction.arg.reader
        read = pickletools.read_bytes8 if instruction.name == "BYTEARRAY8" else read
        yield instruction.name, read and read(stream)


def _pop(stack: list[Any], height: int) -> list[Any]:
    """Removes and returns the items above `height`."""
    if not 0 <= height <= len(stack):
        raise ValueError("its stack is empty")
    items = stack[height:]
    del stack[height:]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise ValueError(f"a {kind.__name__} is missing")
    return stack[-1]


def _named(module: Any, name: Any, calls: Names, values: Names) -> Any:
    module = "builtins" if module == "__builtin__" else module  # its name in pickles that Python 2 can read
    found = calls if (module, name) in calls else values
    if (module, name) not in found:
        raise PickleError(f"names {module}.{name}")
    return found[module, name]
