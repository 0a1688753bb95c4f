"""Keep large CPU buffers in the process between inner steps.

glibc gives every block above 32 MB back to the system when it is freed and takes a fresh one when
it is allocated; the kernel then clears and maps it page by page, which costs more than the
arithmetic of an inner update on packed fast weights. Raising two thresholds lets such blocks be
reused, as torch's own caching allocator does on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = (1 << 31) - 1
_NEVER = -1


@functools.cache
def reuse_large_buffers() -> bool:
    """Let malloc reuse blocks of any size; once per process, without effect off glibc.

    Freed memory then stays with the process for the next step instead of returning to the system.

    Returns:
        Whether the thresholds were set.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
