"""The one kind of error that a user can fix."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""errno values reported as "the disk is full" instead of a traceback."""


class KoalaError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, and what to do.

    `koala` prints it without a traceback and exits with status 2.
    """
