"""What each generation of TPU can do: one row a generation, of one JAX device.

A JAX device is a chip; of v2, v3 and tpu7x it is one of a chip's two cores.  Sources, by column (all of them Google's):

    tflops, hbm_gib, hbm_gbs   docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}, a chip's figures
    ici_gbs                    the same pages for v5e, v5p, v6e and tpu7x, which state the sum of both directions; v4
                               and v3: "TPU v4: An Optically Reconfigurable Supercomputer" (arXiv:2304.01433), 6 links
                               of 50 GB/s and 4 of 70; v2: "A Domain-Specific Supercomputer for Training Deep Neural
                               Networks" (CACM 2020), 4 links of 62 GB/s, which no page of the documentation confirms
    dcn_gbs                    tpu7x's page for v5p, v6e and tpu7x; v5e's page, which states it for a pod.  For v2, v3
                               and v4 no page states it: a host's usual 25 GB/s (jax-ml.github.io/scaling-book), divided
                               by its devices
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device: dense bfloat16 matmuls, memory, and what it can send and receive at the same time."""

    kind: str  # as JAX names it
    tflops: float  # 10¹² FLOP/s in bfloat16
    hbm_gib: float
    hbm_gbs: float  # 10⁹ bytes/s
    ici_gbs: float  # 10⁹ bytes/s in one direction over all links to chips of its slice
    dcn_gbs: float  # 10⁹ bytes/s to other slices
    devices: int = 1  # JAX devices of a chip
    sides: int = 2  # dimensions of a slice: 2 for a rectangle of chips, 3 for a box


CHIPS = {  # by the name of a topology's generation
    "v2": Chip("TPU v2", 22.5, 8.0, 350.0, 124.0, 3.1, devices=2),
    "v3": Chip("TPU v3", 61.5, 16.0, 450.0, 140.0, 3.1, devices=2),
    "v4": Chip("TPU v4", 275.0, 32.0, 1200.0, 300.0, 6.2, sides=3),
    "v5e": Chip("TPU v5 lite", 197.0, 16.0, 819.0, 200.0, 3.1),
    "v5p": Chip("TPU v5", 459.0, 95.0, 2765.0, 600.0, 6.2, sides=3),
    "v6e": Chip("TPU v6 lite", 918.0, 32.0, 1638.0, 400.0, 12.5),
    "tpu7x": Chip("TPU7x", 1153.5, 96.0, 3690.0, 300.0, 6.2, devices=2, sides=3),
}

# bfloat16 matmuls with float32 sums, dense, of one JAX device in 10¹² FLOP/s.  Sources: above; NVIDIA's data
# sheets, without sparsity.  A name that begins with another comes before it.
PEAK_TFLOPS: Mapping[str, float] = {
    **{chip.kind: chip.tflops for chip in sorted(CHIPS.values(), key=lambda chip: chip.kind, reverse=True)},
    "TPU v5e": CHIPS["v5e"].tflops,
    "TPU v5p": CHIPS["v5p"].tflops,
    "A100": 312,
    "A10": 125,
    "A10G": 70,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989.4,
    "H200": 989.4,
    "B200": 2250,
    "L4": 121,
    "L40S": 362,
    "RTX A6000": 154.8,
    "RTX 3090": 71,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s that a device's maker states; None for a device that is not in this table, such as a CPU."""
    for name, tera in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_kind):
            return tera * 1e12
    return None
