"""What the C library does with memory that XLA gives back on a CPU."""

import ctypes
import glob
import os

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Keeps the memory of freed arrays in this process, to be used again; True where that could be arranged.

    glibc returns every large freed array to the system and has the next one mapped and cleared page by page, which
    costs more than most elementwise operations: measured on two cores, x + 1 over 256 MiB reached 22 GB/s instead of
    3 to 6. The process stays as large as it once was. To be called before JAX starts its threads, which is why
    accelerators, whose hosts are left as they are, are recognised by their device files.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, _ACCELERATORS)):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    # One arena: threads would otherwise take large arrays from heaps of their own, which cannot hold them.
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])
