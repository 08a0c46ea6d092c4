"""How long a step takes at best, from what it computes and moves and what the chips' makers state.

    seconds = max(FLOPs / peak, bytes of memory / bandwidth, bytes of collectives / bandwidth)

That is an estimate, and a lower bound: it takes each unit to run at its stated peak, all of them at the same time.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llamavid_jax.aot.chips import Chip


class Estimate(NamedTuple):
    """`seconds` of a step at best, `bound` the unit that takes them, `utilisation` of the peak FLOP/s (MFU)."""

    seconds: float
    bound: str
    utilisation: float


def estimate(chip: Chip, *, flops: float, hbm_bytes: float, ici_bytes: float, dcn_bytes: float = 0) -> Estimate:
    """The step of one device: its share of the FLOPs, and the bytes that it reads, writes and receives."""
    seconds: Mapping[str, float] = {
        "compute": flops / (chip.tflops * 1e12),
        "memory": hbm_bytes / (chip.hbm_gbs * 1e9),
        "interconnect": ici_bytes / (chip.ici_gbs * 1e9),
        "network between slices": dcn_bytes / (chip.dcn_gbs * 1e9),
    }
    bound = max(seconds, key=seconds.__getitem__)
    return Estimate(seconds[bound], bound, seconds["compute"] / seconds[bound])
