"""Preemption: SIGTERM or Ctrl-C → the step after which all processes save and stop.

A scheduler sends SIGTERM, often to one process only, and kills the job some seconds later.  Every process tells the
others at every step whether it got a signal, so that all stop after the same one.  JAX's own notifier
(`multihost_utils.reached_preemption_sync_point`) is not used: it polls once a second, ignores SIGINT, swallows the
second signal, and Orbax's background thread moves the step it compares with.  The handlers set here replace its own.
"""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """`with Preemption() as preemption`, in the main thread; a second signal has its usual effect.

    With several processes, enter it after `jax.distributed.initialize`, which also sets a SIGTERM handler.
    """

    def __init__(self):
        self._signalled = self._requested = False
        self._before, self._told = {}, None

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not set from Python

    def _handle(self, *_) -> None:
        self._signalled = True
        self.__exit__()

    def requested(self) -> bool:
        """Whether to save and stop now: the same on all processes, and True from then on.

        Every process calls it once a step.  With several processes it returns the result of the exchange that the
        previous call started, which the devices finish while they compute.  So it does not wait for the step under way.
        """
        if jax.process_count() == 1:
            return self._signalled
        told, self._told = self._told, _any_process(self._signalled)
        self._requested |= told is not None and bool(told.addressable_data(0))
        return self._requested


def _any_process(value: bool) -> jax.Array:
    """Whether `value` is true on any process, as an array that is still being computed."""
    sharding, maximum = _exchange()
    local = np.full(jax.local_device_count(), value, np.int32)
    return maximum(jax.make_array_from_process_local_data(sharding, local))


@functools.cache
def _exchange():
    mesh = Mesh(np.asarray(jax.devices()), "device")
    replicated = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("device")), jax.jit(jnp.max, out_shardings=replicated)
