"""Full disks: how libraries say that one is full, and the line that a user gets.

with naming_full_disk(work, artifacts):
    ...                                       # raises KoalaError where no more can be written
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from koala.errors import DISK_FULL, KoalaError

# SQLite and DuckDB, whose limit of scratch files is the free space, have words of their own. The others pass on the system's.
_WORDS = (*map(os.strerror, DISK_FULL), "database or disk is full", "failed to offload data block")


def fills_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one that it followed, says that no more can be written."""
    return next(_causes(error), None) is not None


@contextmanager
def naming_full_disk(*folders: Path) -> Iterator[None]:
    """Raise KoalaError in place of an error inside the block that a full disk caused.

    The line names the file, where the error does. If not, it names the first of `folders`, which are written to, that is nearly
    full, or the first of all: what was unfinished may have been removed already. The folder of temporary files is the last.
    """
    try:
        yield
    except KoalaError:
        raise
    except Exception as error:
        cause = next(_causes(error), None)
        if cause is None:
            raise
        place = getattr(cause, "filename", None) or min((*folders, Path(tempfile.gettempdir())), key=_has_space)
        raise KoalaError(
            f"the disk is full at {place} ({_reason(cause)}): free some space there and run the same command again; "
            "finished work is kept"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it followed, as far as they say that no more can be written."""
    while error is not None:
        # shutil.copytree, safetensors, SQLAlchemy and MLflow have no errno, but the words.
        if getattr(error, "errno", None) in DISK_FULL or any(words in str(error) for words in _WORDS):
            yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    if number in DISK_FULL:
        return os.strerror(number)
    return next(words for words in _WORDS if words in str(error))


def _has_space(folder: Path) -> bool:
    """Return whether a hundredth of a folder's file system is free."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    usage = shutil.disk_usage(there)
    return usage.free >= usage.total / 100
