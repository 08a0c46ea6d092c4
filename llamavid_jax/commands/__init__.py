"""The command lines: each module has `main(arguments)`, which returns the exit code; `program` starts and ends them."""

import sys
from typing import Any


def _without_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while a command's modules are imported, before `errors.command` applies, gives only its exit code."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_traceback
