"""Where a thing came from: the commit, the data's hash, the run. What makes a release traceable back to its parameters."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

import yaml

LOCK = Path("dvc.lock")


@cache
def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` behind it where tracked files were changed; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def data_hash(folder: Path) -> str:
    """A hash of what a folder holds, the one that DVC knows it by where DVC made it.

    DVC's hash of an out stands in dvc.lock as soon as its stage ends, so that hundreds of gigabytes are not read again.
    Without it (a stage run by hand), the files' contents are hashed.
    """
    return _locked_hash(folder) or _content_hash(folder)


def _locked_hash(folder: Path) -> str | None:
    if not LOCK.is_file():
        return None
    stages = (yaml.safe_load(LOCK.read_text()) or {}).get("stages", {})
    for stage in stages.values():
        for out in stage.get("outs", ()):
            if out["path"] == folder.as_posix():
                return str(out["md5"])
    return None


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
