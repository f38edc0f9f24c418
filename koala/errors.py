"""The one kind of error that a user can mend."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What `koala` says in a line of its own."""


class KoalaError(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, and what to do.

    `koala` prints it without a traceback and leaves with exit status 2.
    """
