"""A lower bound on the time of a step, from what it computes and moves and the chips' stated speeds.

    seconds = max((FLOPs + recomputed) / peak, bytes of memory / bandwidth, bytes of collectives / bandwidth)

The estimate assumes that each unit runs at its stated peak, all of them at the same time.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llamavid_jax.parallel.chips import Chip

Number = int | float


class Estimate(NamedTuple):
    """`seconds` of a step at best, `bound` the unit that limits it, `utilisation` of the peak FLOP/s (MFU)."""

    seconds: float
    bound: str
    utilisation: float


def estimate(
    chip: Chip, *, flops: Number, hbm_bytes: Number, ici_bytes: Number, dcn_bytes: Number = 0, recomputed: Number = 0
) -> Estimate:
    """The step of one device: its share of the FLOPs, and the bytes that it reads, writes and receives.

    `recomputed` FLOPs, of rematerialisation, take time but do not count for the utilisation.
    """
    seconds: Mapping[str, float] = {
        "compute": (flops + recomputed) / (chip.tflops * 1e12),
        "memory": hbm_bytes / (chip.hbm_gbs * 1e9),
        "interconnect": ici_bytes / (chip.ici_gbs * 1e9),
        "network between slices": dcn_bytes / (chip.dcn_gbs * 1e9),
    }
    bound = max(seconds, key=seconds.__getitem__)
    return Estimate(seconds[bound], bound, flops / (chip.tflops * 1e12) / seconds[bound])
