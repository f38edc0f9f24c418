"""The one kind of error that a user can fix, and others' errors as one line."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""errno values reported as "the disk is full" instead of a traceback: of the disk, of a quota, of a file's size."""


class KoalaError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, and what to do.

    `koala` prints it without a traceback and exits with status 2.
    """


def line_of(error: BaseException) -> str:
    """Return an error's text as one line of at most 200 characters; its kind where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
