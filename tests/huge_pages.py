"""Memory in pages of 2 MB in place of 4 KiB: a fork copies one entry for 512, and its end gives back as few."""

import ctypes
import re
from pathlib import Path

_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def take() -> None:
    """Put this process's own memory into large pages where Linux has them (6.1 and later); nothing changes where it has not."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        area = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\b", line)
        if area is None:  # a file's, or another process's too
            continue
        start, end = -(-int(area[1], 16) // _PAGE) * _PAGE, int(area[2], 16) // _PAGE * _PAGE
        if start < end:
            for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
