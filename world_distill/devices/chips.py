"""What accelerators can do at most, by JAX's name of their kind: published figures, and what XLA grants of the memory.

Peaks are dense bfloat16, as the vendors state them (Google Cloud's TPU pages; NVIDIA's data sheets, without sparsity).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: in short.
      tflops: peak of bfloat16 products, 1e12 operations a second.
      hbm_gib: memory that a program may use, in GiB; for TPUs as XLA's compiler grants it.
      bandwidth: of the memory, GB a second.
    """

    name: str
    tflops: float
    hbm_gib: float
    bandwidth: float


# On v5p and older, a device is a chip; v7x has two devices a chip.
_CHIPS = {
    "TPU v4": Chip("v4", 275, 31.75, 1228),
    "TPU v5 lite": Chip("v5e", 197, 15.75, 819),
    "TPU v5e": Chip("v5e", 197, 15.75, 819),
    "TPU v5": Chip("v5p", 459, 95.74, 2765),
    "TPU v5p": Chip("v5p", 459, 95.74, 2765),
    "TPU v6 lite": Chip("v6e", 918, 31.25, 1640),
    "TPU v6e": Chip("v6e", 918, 31.25, 1640),
    "TPU7x": Chip("v7x", 1153, 94.75, 3690),
    "NVIDIA A100-SXM4-80GB": Chip("a100", 312, 79.0, 2039),
    "NVIDIA H100 80GB HBM3": Chip("h100", 989, 79.0, 3350),
    "NVIDIA H200": Chip("h200", 989, 139.0, 4800),
}


def chip(kind: str) -> Chip | None:
    """The figures of `device.device_kind`; None for a kind that is not in the table, such as a CPU."""
    return _CHIPS.get(kind)
