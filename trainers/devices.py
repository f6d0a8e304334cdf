"""What accelerators can do at best, by their JAX `device_kind`: for utilisation, roofline times and memory limits."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

__all__ = ["Accelerator", "accelerator"]


@dataclass(frozen=True)
class Accelerator:
    """One chip, as JAX programs it by default."""

    name: str
    bfloat16: float
    """Dense FLOP/s of matrix products in bfloat16."""
    float32: float
    """The same for float32 arrays at JAX's default precision: bfloat16 passes on a TPU, TF32 on an NVIDIA GPU."""
    memory: float
    """Bytes of high-bandwidth memory."""
    bandwidth: float
    """Bytes a second between that memory and the cores."""
    interconnect: float
    """Bytes a second that the chip sends over all its links to other chips."""

    def peak(self, precision: str) -> float:
        return self.bfloat16 if precision == "bfloat16" else self.float32


def _tpu(name: str, tera: float, gib: float, gb: float, gbit: float) -> Accelerator:
    return Accelerator(name, tera * 1e12, tera * 1e12, gib * 2**30, gb * 1e9, gbit * 1e9 / 8)


def _gpu(name: str, tera: float, tera_float32: float, gigabytes: float, gb: float, link: float) -> Accelerator:
    return Accelerator(name, tera * 1e12, tera_float32 * 1e12, gigabytes * 1e9, gb * 1e9, link * 1e9)


# The first pattern that the whole device_kind matches decides. Marketing figures with sparsity are halved.
_CHIPS: tuple[tuple[str, Accelerator], ...] = (
    # Google Cloud documentation, "TPU versions": a page each of v4, v5e, v5p, v6e and TPU7x.
    (r"TPU v4", _tpu("TPU v4", 275, 32, 1228, 2400)),
    (r"TPU v5 ?(lite|e)", _tpu("TPU v5e", 197, 16, 819, 1600)),
    (r"TPU v5p?", _tpu("TPU v5p", 459, 95, 2765, 4800)),
    (r"TPU v6 ?(lite|e)", _tpu("TPU v6e", 918, 32, 1640, 3584)),
    (r"TPU ?v?7x?", _tpu("TPU7x", 2307, 192, 7380, 9600)),
    # NVIDIA data sheets: A100 (SXM and PCIe), H100, H200, HGX B200, L4, L40S, T4, V100. Links: half of the quoted
    # NVLink or PCIe rate, which counts both directions.
    (r".*A100.*40GB.*", _gpu("A100 40 GB", 312, 156, 40, 1555, 300)),
    (r".*A100.*PCIe.*", _gpu("A100 80 GB PCIe", 312, 156, 80, 1935, 300)),
    (r".*A100.*", _gpu("A100 80 GB", 312, 156, 80, 2039, 300)),
    (r".*H100.*PCIe.*", _gpu("H100 PCIe", 756, 378, 80, 2000, 300)),
    (r".*H100.*(HBM3|SXM).*", _gpu("H100 SXM", 989, 494, 80, 3350, 450)),
    (r".*\bH200\b.*", _gpu("H200", 989, 494, 141, 4800, 450)),
    (r".*\bB200\b.*", _gpu("B200", 2250, 1125, 180, 8000, 900)),
    (r".*\bL40S\b.*", _gpu("L40S", 362, 183, 48, 864, 32)),
    (r".*\bL4\b.*", _gpu("L4", 121, 60, 24, 300, 32)),
    # Neither has bfloat16 units: XLA computes such products in float32.
    (r".*\bT4\b.*", _gpu("T4", 8.1, 8.1, 16, 320, 16)),
    (r".*\bV100\b.*", _gpu("V100", 15.7, 15.7, 16, 900, 150)),
)


def accelerator(devices: Sequence[jax.Device]) -> Accelerator | None:
    """What each of these devices is, or None if its kind is not in the table.

    Where JAX shows the cores of a chip as devices of their own, each has its share of the chip.
    """
    kind = devices[0].device_kind
    for pattern, chip in _CHIPS:
        if re.fullmatch(pattern, kind):
            places = {tuple(d.coords) for d in devices} if hasattr(devices[0], "coords") else devices
            share = len(devices) / len(places)
            parts = ("bfloat16", "float32", "memory", "bandwidth", "interconnect")
            return dataclasses.replace(chip, **{part: getattr(chip, part) / share for part in parts})
    return None
