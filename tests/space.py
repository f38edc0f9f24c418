"""Space that is short: a real file system of a few kB, or a real limit on files' sizes.

with short_of_space(folder, "disk") as grow:
    ...                                       # OSError: the disk is full
    grow()                                    # a little more of it
"""

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Grow = Callable[[], None]
GROWTH = 1.6
DISK, FILES = 8_192, 512  # bytes at first


@contextmanager
def small_disk(folder: Path, size: float = DISK) -> Iterator[Grow]:
    """Mount a file system of so many bytes there; each call makes it larger. Raises PermissionError where none may be mounted."""

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True).returncode == 0

    def grow() -> None:
        nonlocal size
        size *= GROWTH
        assert mount("-t", "tmpfs", "-o", f"remount,size={int(size)}")

    if not mount("-t", "tmpfs", "-o", f"size={int(size)}"):
        raise PermissionError
    try:
        yield grow
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_files() -> Iterator[Grow]:
    """Limit the sizes of files to 512 B; each call raises the limit. This process's children have it too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = FILES / GROWTH

    def grow() -> None:
        nonlocal size
        size *= GROWTH
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), before[1]))

    try:
        grow()
        yield grow
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def short_of_space(folder: Path, how: str) -> Iterator[Grow]:
    """Make the space in a folder short: by a small disk where one may be mounted, else by small files."""
    if how == "disk":
        try:
            with small_disk(folder) as grow:
                yield grow
            return
        except PermissionError:
            pass
    with small_files() as grow:
        yield grow
