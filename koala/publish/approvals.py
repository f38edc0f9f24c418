"""Approvals: verdicts of the gate that a person overruled, by name and with a reason.

They stand in approvals.yaml, which git tracks. An approval holds for one evaluation: other figures want another.
"""

import getpass
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from koala.config import Config
from koala.errors import KoalaError, line_of

FILE = Path("approvals.yaml")


class Approval(Config):
    """A person's word that a student is released though it misses rules of the gate."""

    student: str
    """The student's name."""
    evaluation: str
    """SHA-256 of the metrics.json that was judged."""
    by: str
    """Who approved."""
    because: str
    """Why."""
    at: datetime
    """When."""


def read(file: Path = FILE) -> tuple[Approval, ...]:
    """Return all approvals; none where there is no file. Raises KoalaError where it does not hold approvals."""
    if not file.is_file():
        return ()
    try:
        return TypeAdapter(tuple[Approval, ...]).validate_python(yaml.safe_load(file.read_text()) or ())
    except (yaml.YAMLError, ValidationError) as error:
        raise KoalaError(
            f"{file} does not hold approvals: {line_of(error)}: write them by `koala release approve`"
        ) from None


def digest(evaluation: Path) -> str:
    """Return the SHA-256 of an evaluation's metrics.json."""
    return hashlib.sha256((evaluation / "metrics.json").read_bytes()).hexdigest()


def find(approvals: Sequence[Approval], student: str, evaluation: Path) -> Approval | None:
    """Return the approval of a student with this evaluation, or None."""
    found = digest(evaluation)
    return next((each for each in approvals if each.student == student and each.evaluation == found), None)


def add(student: str, evaluation: Path, because: str, by: str | None = None, file: Path = FILE) -> Approval:
    """Append an approval to `file`. by: left out, the name of the account. Raises KoalaError where it has none."""
    approval = Approval(
        student=student,
        evaluation=digest(evaluation),
        by=by or _account(),
        because=because,
        at=datetime.now(UTC).replace(microsecond=0),
    )
    there = file.read_text() if file.is_file() else ""
    with file.open("a") as stream:
        if there and not there.endswith("\n"):  # a person's editor left it so
            stream.write("\n")
        yaml.safe_dump([approval.model_dump(mode="json")], stream, sort_keys=False, allow_unicode=True)
    return approval


def _account() -> str:
    """Return the name of the account, which a container that runs under a number lacks."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise KoalaError("this account has no name: say who approves (--by)") from None
