"""Branches `retrain/DATE`: a commit each that says what a retraining is of, and why.

    with scratch() as tree:                  # a clean worktree of HEAD, which goes again
        ...                                  # change files in it
        retraining = propose(tree, "New data", key="...", push=False)

The commit's trailer `Retraining: KEY` names its cause. A cause that some branch names already makes no second commit, whoever asks,
however many at a time: git creates a branch once, here or at `origin`.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from koala import provenance

ORIGIN = "origin"
_TRAILER = "Retraining"
_PREFIX = "retrain"


class BranchError(Exception):
    """git refused. Its text is one line."""


@dataclass(frozen=True)
class Retraining:
    """A commit on its branch."""

    branch: str
    commit: str
    is_new: bool
    """True if this call made it."""


@contextmanager
def scratch() -> Iterator[Path]:
    """Provide a worktree of this checkout's commit, outside it: what was changed here and not committed is not in it."""
    with tempfile.TemporaryDirectory(prefix="koala-watch-") as folder:
        tree = Path(folder, "tree")
        _git("worktree", "prune", "--expire=1.day.ago")  # of calls that were killed
        _git("worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def known(key: str, fetch: bool) -> Retraining | None:
    """Return the retraining of a cause, if there is a branch of it. fetch: ask `origin` first."""
    if fetch:
        refs = f"refs/heads/{_PREFIX}/*:refs/remotes/{ORIGIN}/{_PREFIX}/*"
        _git("fetch", "--quiet", "--no-tags", ORIGIN, refs)
    fields = f"%(objectname) %(refname:lstrip=-2) %(contents:trailers:key={_TRAILER},valueonly,separator=%2C)"
    for line in _refs(fields):
        commit, branch, *found = line.split()
        if found == [key]:
            return Retraining(branch, commit, is_new=False)
    return None


def propose(tree: Path, message: str, key: str, push: bool) -> Retraining:
    """Commit what was changed in `tree` on a branch of its own, unless the cause has one.

    Args:
        tree: A worktree of `scratch`.
        message: What the retraining is of, and why.
        key: Names the cause: one word.
        push: Create the branch at `origin`, where machines clone it.

    Raises:
        BranchError: git knows no author, or `origin` refuses.
    """
    text = f"{message}\n\n{_TRAILER}: {key}\n"
    _git("commit", "--quiet", "--all", "--allow-empty", "--cleanup=verbatim", "--message", text, tree=tree)
    commit = _git("rev-parse", "HEAD", tree=tree)
    for branch in _names():
        try:
            if push:
                _git("push", "--quiet", ORIGIN, f"{commit}:refs/heads/{branch}")
            _git("update-ref", f"refs/heads/{branch}", commit, "0" * len(commit))
        except BranchError:
            if another := known(key, fetch=push):
                return another
            if branch not in _refs("%(refname:lstrip=-2)"):
                raise
        else:
            return Retraining(branch, commit, is_new=True)
    raise AssertionError  # names do not end


def fast_forward(commit: str) -> None:
    """Move this checkout's branch forward to a commit; leave it where it holds the commit already.

    Raises BranchError where it has gone another way, or where files that would change hold changes of their own.
    """
    try:
        _git("merge", "--quiet", "--ff-only", commit)
    except BranchError as error:
        raise BranchError(
            f"this checkout cannot go on to {commit[:7]}: merge it by hand, and run the flow again ({error})"
        ) from None
    provenance.git_commit.cache_clear()


def _names() -> Iterator[str]:
    today = f"{_PREFIX}/{datetime.now(UTC):%Y-%m-%d}"
    yield today
    yield from (f"{today}-{number}" for number in count(2))


def _refs(fields: str) -> list[str]:
    """Return a line of each branch of a retraining, here and at `origin`."""
    places = f"refs/heads/{_PREFIX}/", f"refs/remotes/{ORIGIN}/{_PREFIX}/"
    return _git("for-each-ref", f"--format={fields}", *places).splitlines()


def _git(*arguments: str, tree: Path | None = None) -> str:
    """Run git, without the hooks that people have for their own commits. Return its output. Raises BranchError."""
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        if "user.email" in done.stderr:
            raise BranchError(
                "git knows no author: set GIT_AUTHOR_NAME, GIT_AUTHOR_EMAIL and the same of GIT_COMMITTER_"
            )
        said = [line for line in done.stderr.splitlines() if line.startswith(("fatal:", "error:", " ! "))]
        raise BranchError(f"git {arguments[0]}: {(said or done.stderr.splitlines() or ['failed'])[0].strip()}")
    return done.stdout.strip()
