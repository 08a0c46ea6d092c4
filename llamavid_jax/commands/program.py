"""How every command begins and ends: compiled programs are cached for the next call, and the process exits at once."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def keep_programs() -> None:
    """Caches the programs that XLA compiles in the user's cache folder, for the next call.

    `JAX_ENABLE_COMPILATION_CACHE=false` turns that off; `JAX_COMPILATION_CACHE_DIR` names another folder.
    """
    import jax  # here, so that `--help` does not wait for it

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        given = os.environ.get("XDG_CACHE_HOME", "")  # valid only as an absolute path
        try:
            folder = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "llamavid_jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or not writable: no cache
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX skips compilations under a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its code, without the half second that JAX takes to shut down.

    Compiled work may still run after Ctrl-C, and would crash the interpreter's normal exit.
    """
    gc.set_threshold(100_000)  # imports and traces create a million long-lived objects
    status = main()
    with contextlib.suppress(OSError):  # of a stream that failed before, which `main` has reported
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
