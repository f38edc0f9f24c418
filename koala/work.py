"""Work in progress: kept outside DVC's outs, found again by a run with the same inputs, moved to the out when finished.

DVC removes an out before its stage runs, so that what a stage needs to go on after it was cut cannot live there.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def fingerprint(**parts: Any) -> str:
    """A short stable name for a set of JSON-able values: the folder of a stage's resume state is called by it."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resume_folder(stage: str, **parts: Any) -> Path:
    """`runs/<stage>/<fingerprint>/`: work in progress, outside DVC's outs, found again by a run with the same inputs."""
    folder = Path("runs", stage, fingerprint(**parts))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def finish(work: Path, out: Path) -> None:
    """Make the finished folder `work` a stage's out, in one step; what a run by hand left there before goes."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work, out)
