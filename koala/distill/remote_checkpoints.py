"""Checkpoints in S3 besides, for machines that share no disk: a stage whose machine was lost resumes on another.

    s3://BUCKET/PREFIX/WORK/step-00000200-1f3a5b7c/{student,ema,optimizer}.safetensors, state.json, history.jsonl, complete.json

Each push has a folder of its own, so that two machines never mix theirs. complete.json is written last, and removed first: it
names the files and their sizes, and a push without it does not count. The newest two stay. Credentials, region and endpoint
come from the environment alone (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from koala.console import say
from koala.distill import curves
from koala.distill.config import DistillMachine
from koala.distill.job import checkpoints
from koala.errors import KoalaError, line_of

COMPLETE = "complete.json"
"""Object that marks a push as complete."""
KEPT = 2
"""Complete pushes that stay."""

_FOLDER = re.compile(r"(step-\d{8})-[0-9a-f]{8}")
_FILE = re.compile(r"[a-z]+\.(safetensors|jsonl?)")  # no path that a bucket could lead us along


@contextmanager
def kept(machine: DistillMachine, state: Path) -> Iterator[Callable[[], None]]:
    """Fetch the newest checkpoint into `state`, unless one as new is there. Yield a function that pushes new ones, if it is time.

    The function returns at once: a thread pushes. The end of the block pushes what is newest, and waits. Without
    `machine.checkpoints` nothing happens. A push that fails is a line, and the next one tries again. Raises KoalaError where
    the bucket cannot be read: to start over in silence could lose days.
    """
    if machine.checkpoints is None:
        yield lambda: None
        return
    remote = _Remote(machine.checkpoints, state, machine.checkpoints_minutes)
    remote.fetch()
    try:
        yield remote.push_if_due
    finally:
        remote.finish()


@dataclass(frozen=True)
class _Push:
    """A complete push."""

    folder: str
    step: str
    """Name of the checkpoint."""
    files: dict[str, int]
    """Sizes by name."""


class _Remote:
    """The checkpoints of one training under a prefix."""

    def __init__(self, location: str, state: Path, minutes: float) -> None:
        import boto3

        parts = urlsplit(location)
        self._location, self._state, self._seconds = location, state, 60 * minutes
        self._bucket, self._prefix = parts.netloc, f"{parts.path.strip('/')}/".lstrip("/")
        self._s3: Any = boto3.Session().client("s3")
        self._thread: threading.Thread | None = None
        self._begun = time.monotonic()
        self._pushed: str | None = None  # the newest checkpoint that is there, by name

    def fetch(self) -> None:
        """Download the newest complete push, where `state` has no checkpoint as new."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            there = self._complete(self._objects())
            if not there:
                return
            newest = there[-1]
            here = checkpoints(self._state)
            if not here or here[-1].name < newest.step:
                say(f"distill: fetching {newest.step} from {self._location}")
                self._download(newest)
            self._pushed = newest.step
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise KoalaError(
                f"cannot read checkpoints at {self._location}: {line_of(error)}: put the bucket or the AWS_ variables right, or "
                "leave `checkpoints` of the machine out to start without them"
            ) from None

    def push_if_due(self) -> None:
        """Begin to push the newest checkpoint, if enough time has passed, none is being pushed, and it is a new one."""
        if time.monotonic() - self._begun >= self._seconds and not (self._thread and self._thread.is_alive()):
            self._begin()

    def finish(self) -> None:
        """Push the newest checkpoint, unless it is there, and wait."""
        if self._thread:
            self._thread.join()
        self._begin()
        if self._thread:
            self._thread.join()

    def _begin(self) -> None:
        here = checkpoints(self._state)
        if here and here[-1].name != self._pushed:
            self._begun = time.monotonic()
            self._thread = threading.Thread(target=self._push, args=(here[-1],), name="push", daemon=True)
            self._thread.start()

    def _push(self, checkpoint: Path) -> None:
        """Upload a checkpoint and the losses, mark it as complete, and remove older pushes."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        folder = f"{self._prefix}{checkpoint.name}-{uuid.uuid4().hex[:8]}"
        try:
            with ExitStack() as stack:
                # Opened all at once: training may remove the checkpoint meanwhile, and what is open stays readable.
                files: dict[str, Any] = {
                    path.name: stack.enter_context(path.open("rb")) for path in checkpoint.iterdir()
                }
                sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
                # Losses of later steps may be among these, and half a line: resuming drops them.
                losses = (self._state / curves.HISTORY).read_bytes()
                files[curves.HISTORY], sizes[curves.HISTORY] = BytesIO(losses), len(losses)
                for name, file in files.items():
                    self._s3.upload_fileobj(file, self._bucket, f"{folder}/{name}")
            self._s3.put_object(Bucket=self._bucket, Key=f"{folder}/{COMPLETE}", Body=json.dumps(sizes).encode())
            self._pushed = checkpoint.name
            self._prune()
        except FileNotFoundError:
            return  # removed before it was open: there is a newer one
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            say(f"distill: {checkpoint.name} is not at {self._location}: {line_of(error)}: tried again with the next")

    def _prune(self) -> None:
        """Remove what is older than the pushes that stay, also what never became complete."""
        objects = self._objects()
        there = self._complete(objects)
        if len(there) <= KEPT:
            return
        oldest = there[-KEPT].folder
        for folder in sorted(objects):
            if folder < oldest:
                for name in sorted(objects[folder], key=lambda name: name != COMPLETE):
                    self._s3.delete_object(Bucket=self._bucket, Key=f"{self._prefix}{folder}/{name}")

    def _objects(self) -> dict[str, dict[str, int]]:
        """Return the sizes of all objects, by the folder of their push and their name."""
        found: dict[str, dict[str, int]] = {}
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        for entry in (entry for page in pages for entry in page.get("Contents", ())):
            folder, _, name = entry["Key"].removeprefix(self._prefix).partition("/")
            if _FOLDER.fullmatch(folder) and _FILE.fullmatch(name):
                found.setdefault(folder, {})[name] = entry["Size"]
        return found

    def _complete(self, objects: dict[str, dict[str, int]]) -> list[_Push]:
        """Return the complete pushes, oldest first."""
        pushes = []
        for folder in sorted(folder for folder, files in objects.items() if COMPLETE in files):
            answer = self._s3.get_object(Bucket=self._bucket, Key=f"{self._prefix}{folder}/{COMPLETE}")
            sizes = json.loads(answer["Body"].read())
            files = {name: size for name, size in objects[folder].items() if name != COMPLETE}
            match = _FOLDER.fullmatch(folder)
            if match and sizes == files:
                pushes.append(_Push(folder, match[1], files))
        return pushes

    def _download(self, push: _Push) -> None:
        """Put a push into `state`, its checkpoint in one step."""
        final = self._state / push.step
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in push.files:
            self._s3.download_file(self._bucket, f"{self._prefix}{push.folder}/{name}", str(partial / name))
        (partial / curves.HISTORY).replace(self._state / curves.HISTORY)
        partial.rename(final)
