"""The one kind of error that a user can fix."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""errno values reported as "the disk is full" instead of a traceback: of the disk, of a quota, of a file's size."""


class KoalaError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, and what to do.

    `koala` prints it without a traceback and exits with status 2.
    """
