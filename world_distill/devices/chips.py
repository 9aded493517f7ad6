"""What accelerators can do at most, by JAX's name of their kind: published figures, and what XLA grants of the memory.

Peaks are dense bfloat16, as the vendors state them (Google Cloud's TPU pages; NVIDIA's data sheets, without sparsity).
Google's pages state what links carry in both directions together; a chip sends half of that. The clock is the peak
divided by the operations of a cycle: 131,072 on v5e, 262,144 on v5p, 524,288 on v6e and on each device of v7x. XLA's
estimates for a product of 32,768 x 5,120 x 1,280 come to 90 to 98 % of these. On v4 they come to half, as of one of its
two cores, so it has no clock here.
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
      ghz: clock in which XLA's compiler estimates cycles; 0: not known.
      sends: over all links to other chips of a slice, GB a second; 0: not known.
      links: to other chips of a slice.
      attention: share of the peak at which attention kernels of heads of 128 run if nothing waits, by the schedules
        that the compiler makes for them (`tests/benchmarks/attention_tiles.py`), forward; 0: not known.
      vmem_mib: fast memory of a core that a kernel may use, as JAX's table of TPUs has it; 0: not known.
    """

    name: str
    tflops: float
    hbm_gib: float
    bandwidth: float
    ghz: float = 0.0
    sends: float = 0.0
    links: int = 0
    attention: float = 0.0
    vmem_mib: int = 0


# On v5p and older, a device is a chip; v7x has two devices a chip, which share its links.
_CHIPS = {
    "TPU v4": Chip("v4", 275, 31.75, 1228, vmem_mib=16),
    "TPU v5 lite": Chip("v5e", 197, 15.75, 819, 1.5, 200, 4, 0.95, 128),
    "TPU v5e": Chip("v5e", 197, 15.75, 819, 1.5, 200, 4, 0.95, 128),
    "TPU v5": Chip("v5p", 459, 95.74, 2765, 1.75, 600, 6, 0.94, 64),
    "TPU v5p": Chip("v5p", 459, 95.74, 2765, 1.75, 600, 6, 0.94, 64),
    "TPU v6 lite": Chip("v6e", 918, 31.25, 1640, 1.75, 400, 4, 0.37, 128),
    "TPU v6e": Chip("v6e", 918, 31.25, 1640, 1.75, 400, 4, 0.37, 128),
    "TPU7x": Chip("v7x", 1153, 94.75, 3690, 2.2, 300, 6, vmem_mib=64),
    "NVIDIA A100-SXM4-80GB": Chip("a100", 312, 79.0, 2039),
    "NVIDIA H100 80GB HBM3": Chip("h100", 989, 79.0, 3350),
    "NVIDIA H200": Chip("h200", 989, 139.0, 4800),
}


def chip(kind: str) -> Chip | None:
    """The figures of `device.device_kind`; None for a kind that is not in the table, such as a CPU."""
    return _CHIPS.get(kind)
