"""How every command begins and ends: compiled programs are kept for the next call, and the process leaves at once."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def keep_programs() -> None:
    """The programs that XLA compiles go into the user's cache folder, from where the next call takes them.

    `JAX_ENABLE_COMPILATION_CACHE=false` turns that off; `JAX_COMPILATION_CACHE_DIR` names another folder.
    """
    import jax  # here, so that `--help` does not wait for it

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        given = os.environ.get("XDG_CACHE_HOME", "")  # which counts only as a full path
        try:
            folder = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "llamavid_jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or none to write to: as without a cache
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX's own leaves out what takes below a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and leaves with its exit code, without the half second that JAX takes to put itself away.

    Work that was compiled may still run after Ctrl-C, and would crash the interpreter's own end.
    """
    gc.set_threshold(100_000)  # imports and traces make a million objects that stay
    status = main()
    with contextlib.suppress(OSError):  # of a stream that has failed before, which `main` has said
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
