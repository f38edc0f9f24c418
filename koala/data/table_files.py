"""The files of a list: what a location holds, what marks each file's content, and each file on this disk.

files = located(config)
files.names                     # in the order in which they are read
with files.fetched(name) as path: ...
"""

import fnmatch
import glob
import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from koala.data.table_config import TableConfig
from koala.errors import KoalaError

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
"""Formats by a file name's ending."""
_COMPRESSED = (".gz", ".zst")
_CHUNK = 2**22  # bytes


def format_of(name: str) -> str:
    """Return a file's format by its name. Raises KoalaError for a name that tells none."""
    path = PurePosixPath(name)
    found = FORMATS.get((path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower())
    if found is None:
        raise KoalaError(
            f"cannot tell what {path.name} is: name it .parquet, .csv, .tsv, .jsonl or .json (.gz and .zst may follow)"
        )
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class ChangedError(KoalaError):
    """A list does not hold the content that was meant."""


class Files(ABC):
    """The files of one list."""

    names: tuple[str, ...]
    """Names under the location, in the order in which they are read."""

    def commit(self) -> str | None:
        """Return the commit that a revision stands for now, on the Hub."""
        return None

    @abstractmethod
    def mark(self, name: str) -> str:
        """Return what marks a file's content: it changes where the content does."""

    @abstractmethod
    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yield the file on this disk. Raises ChangedError where it is not, or does not stay, as it was looked at."""

    def check_pin(self, config: TableConfig) -> None:
        """Raise ChangedError where the location holds other content than its pin says."""
        pin = config.pin
        if pin is None:
            return
        what = ""
        if pin.location != config.location:
            what = f"the pin is of {pin.location}"
        elif gone := [name for name in pin.files if name not in self.names]:
            what = f"{gone[0]} is gone"
        elif new := [name for name in self.names if name not in pin.files]:
            what = f"{new[0]} is new"
        elif changed := [name for name in self.names if self.mark(name) != pin.files[name]]:
            what = f"{changed[0]} changed"
        elif tuple(pin.files) != self.names:
            what = "its files are read in another order"
        if what:
            raise ChangedError(
                f"{config.location} is not what source.lock.yaml pins ({what}): run `koala data update` to take it as it is"
            )


def located(config: TableConfig) -> Files:
    """Return the files of a list, at its pin where it has one. Raises KoalaError where there are none."""
    kinds: dict[str, type[Files]] = {"file": _OnDisk, "hub": _OnHub, "s3": _OnS3}
    return kinds[config.kind](config)  # type: ignore[call-arg]


def _changed(location: str, name: str) -> ChangedError:
    return ChangedError(
        f"{location} changed while it was read ({name}): run this again when nothing writes to it; "
        "where the list is pinned and the new content is meant, after `koala data update`"
    )


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name)


def _is_table(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.with_suffix("") if path.suffix in _COMPRESSED else path
    return plain.suffix.lower() in FORMATS and not path.name.startswith((".", "_"))


def _matches(wanted: Iterable[str], there: Iterable[str], place: str) -> tuple[str, ...]:
    """Return the names among `there` that match each wanted name or pattern, in its order. A `*` stops at a slash."""
    sorted_names = sorted(there)
    found: dict[str, None] = {}
    for each in wanted:
        matching = [name for name in sorted_names if _fits(name, each)]
        if not matching:
            raise KoalaError(f"{place} has no file {each}: set source.files in params.yaml")
        found |= dict.fromkeys(matching)
    return tuple(found)


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


class _OnDisk(Files):
    def __init__(self, config: TableConfig) -> None:
        location, wanted = Path(config.location), list(config.files)
        self._folder = location if wanted or location.is_dir() else Path()
        if not wanted and location.is_dir():
            wanted = sorted(file.name for file in location.iterdir() if _is_table(file.name))
            if not wanted:
                raise KoalaError(f"{location} holds no table: set source.location and source.files in params.yaml")
        names: dict[str, None] = {}
        for each in wanted or [config.location]:
            there = [each] if (self._folder / each).is_file() else sorted(glob.glob(each, root_dir=self._folder))
            if not (matching := [name for name in there if (self._folder / name).is_file()]):
                raise KoalaError(
                    f"there is no file {self._folder / each}: set source.location and source.files in params.yaml"
                )
            names |= dict.fromkeys(matching)
        self.names = tuple(names)
        self._location = config.location
        self._marks: dict[str, str] = {}

    def mark(self, name: str) -> str:
        self._marks[name] = self._digest(name)
        return self._marks[name]

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        with (self._folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yield the file itself. Afterwards it must have the hash that it had, or else at least its time and size."""
        file = self._folder / name
        before = _stamp(file)
        yield file
        looked_at = self._marks.get(name)
        if _stamp(file) != before or (looked_at and self._digest(name) != looked_at):
            raise _changed(self._location, name)


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Return what changes where a file is written or replaced; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _OnHub(Files):
    def __init__(self, config: TableConfig) -> None:
        self._repo = config.location
        self._revision = (config.pin and config.pin.commit) or config.revision or ""
        self.names = config.files
        if any(map(_is_pattern, config.files)):
            self.names = _matches(config.files, self._all(), f"the data set {self._repo}")

    def commit(self) -> str:
        from huggingface_hub import HfApi

        with self._explained("the commit"):
            return str(HfApi().dataset_info(self._repo, revision=self._revision).sha)

    def mark(self, name: str) -> str:
        return f"commit:{self._revision}"

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yield the file in the Hub's cache. The first file's commit is that of all, also where a branch moves meanwhile."""
        from huggingface_hub import hf_hub_download

        with self._explained(name):
            file = Path(hf_hub_download(self._repo, name, repo_type="dataset", revision=self._revision))
        self._revision = file.parents[name.count("/")].name  # .../snapshots/COMMIT/NAME
        yield file

    def _all(self) -> list[str]:
        from huggingface_hub import HfApi

        with self._explained("the list of files"):
            return HfApi().list_repo_files(self._repo, repo_type="dataset", revision=self._revision)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what the Hub answers into one line."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        repo = self._repo
        try:
            yield
        except GatedRepoError:
            raise KoalaError(f"the data set {repo} is gated: accept its terms on the Hub and set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise KoalaError(
                f"the Hub has no data set {repo}, or it is private: check source.location, set HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise KoalaError(f"the data set {repo} has no revision {self._revision}: set source.revision") from None
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):
            raise KoalaError(
                f"cannot reach the Hub for {repo}/{name}, and it is not in the cache: check the network"
            ) from None
        except EntryNotFoundError:
            raise KoalaError(f"the data set {repo} has no file {name} at {self._revision}: set source.files") from None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise KoalaError(f"cannot fetch {name} of {repo} from the Hub: {first_line(error)}") from None


class _OnS3(Files):
    def __init__(self, config: TableConfig) -> None:
        self._location = config.location
        parts = urlsplit(config.location.replace("?", "%3F").replace("#", "%23"))
        self._bucket, key = parts.netloc, parts.path.lstrip("/").replace("%3F", "?").replace("%23", "#")
        if parts.scheme != "s3" or not self._bucket or not (key or config.files):
            raise KoalaError(f"source.location is {config.location!r}: write it as s3://bucket/key")
        self._prefix = key.rstrip("/") + "/" if config.files and key else ""
        wanted = list(config.files) or [key]
        self._heads: dict[str, dict[str, Any]] = {}
        with self._explained():
            import boto3

            self._client = boto3.Session().client("s3")
            self._client.meta.events.register("provide-client-params.s3.GetObject", self._as_looked_at)
            if not config.files and key.endswith("/"):
                self._prefix = key
                folder = [name for name in self._all(key) if "/" not in name and _is_table(name)]
                if not folder:
                    raise KoalaError(f"{config.location} holds no table: set source.location in params.yaml")
                wanted = sorted(folder)
            elif any(map(_is_pattern, wanted)):
                before = self._prefix + (wanted[0][: _first_magic(wanted[0])] if len(wanted) == 1 else "")
                wanted = list(_matches(wanted, self._all(before), config.location))
        self.names = tuple(wanted)

    def _all(self, before: str) -> list[str]:
        """Return all names that begin with `before`, without the location's own part."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=before)
        return [found["Key"].removeprefix(self._prefix) for page in pages for found in page.get("Contents", ())]

    def _head(self, name: str) -> dict[str, Any]:
        if name not in self._heads:
            with self._explained():
                self._heads[name] = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        return self._heads[name]

    def mark(self, name: str) -> str:
        """Return ETag and version, where the bucket has versions."""
        head = self._head(name)
        version = head.get("VersionId")
        return f"etag:{head['ETag'].strip(chr(34))}" + (f" version:{version}" if version else "")

    def _as_looked_at(self, params: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Return a download's parameters with the ETag that was looked at: S3 refuses to give other content (412)."""
        return params | {"IfMatch": self._head(params["Key"].removeprefix(self._prefix))["ETag"]}

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yield a copy that is removed afterwards. It is of the version, or else of the content, that was looked at."""
        from s3transfer.exceptions import S3DownloadFailedError

        with tempfile.TemporaryDirectory(prefix="koala-source-") as folder:
            file = Path(folder, PurePosixPath(name).name)
            version = self._head(name).get("VersionId")
            extra = {"VersionId": version} if version else None
            try:
                with self._explained():
                    self._client.download_file(self._bucket, self._prefix + name, str(file), ExtraArgs=extra)
            except S3DownloadFailedError:  # raised for the status 412 alone
                raise _changed(self._location, name) from None
            yield file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what S3 answers into one line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            yield
        except NoCredentialsError:
            raise KoalaError(
                "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        except (BotoCoreError, Boto3Error, ClientError) as error:
            raise KoalaError(f"cannot fetch {self._location} from S3: {first_line(error)}") from None


def _first_magic(pattern: str) -> int:
    """Return where a pattern's first special character stands."""
    return min(pattern.find(character) for character in "*?[" if character in pattern)
