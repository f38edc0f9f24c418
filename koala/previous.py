"""What a stage made last: dvc.lock names it and the files that decided it; DVC's cache or its remote holds it.

    last = previous.find("download", artifact)     # from dvc.lock
    last.changed(code)
    with last.opened() as files:                   # with DVC, whose import takes a second
        files.read("provenance.json")
        files.link(folder)

DVC writes dvc.lock once a stage has ended: while its command runs, the entry is of the run before. It holds its lock of the
repository no longer then, and what is fetched here needs none.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from koala.console import say
from koala.errors import KoalaError

if TYPE_CHECKING:
    from dvc.repo import Repo

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Last:
    """An entry of dvc.lock."""

    stage: str
    """The stage, as DVC names it."""
    deps: Mapping[str, str]
    """MD5 of each dep by its path."""
    content: str
    """DVC's hash of the folder that the stage made."""

    def changed(self, files: Iterable[Path]) -> set[str]:
        """Return the paths among the deps, then or now, whose content is not the same. `files` are the deps now."""
        now = {file.as_posix(): hashlib.md5(file.read_bytes()).hexdigest() for file in files if file.is_file()}
        return {path for path in {*self.deps, *now} if self.deps.get(path) != now.get(path)}

    @contextmanager
    def opened(self) -> "Iterator[Files]":
        """Provide the files that the stage made. Raises KoalaError where they are nowhere, and whatever DVC raises."""
        from dvc.repo import Repo

        with Repo() as repo:
            yield Files(repo, self)


class Files:
    """The files of a folder that DVC keeps. What its cache lacks is fetched from its remote."""

    def __init__(self, repo: "Repo", last: Last) -> None:
        """Look up which files there are."""
        self._repo = repo
        self._stage = last.stage
        (listing,) = self._cached([last.content])
        self._md5 = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        (file,) = self._cached([self._md5[name]])
        return file.read_bytes()

    def link(self, folder: Path, parts: Collection[str] = ("",)) -> None:
        """Link, in a new folder, the files whose names begin with one of `parts`: to be read, since the cache is DVC's.

        Symbolic links: they take no room, and the cache may be on another disk.
        """
        names = [name for name in self._md5 if name.startswith(tuple(parts))]
        for name, file in zip(names, self._cached([self._md5[name] for name in names]), strict=True):
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)

    def _cached(self, hashes: Collection[str]) -> list[Path]:
        """Return the files in DVC's cache, once all are there."""
        files = {each: Path(self._repo.cache.local.oid_to_path(each)).absolute() for each in hashes}
        if missing := [each for each, file in files.items() if not file.is_file()]:
            self._fetch(missing)
            if left := [each for each in missing if not files[each].is_file()]:
                raise KoalaError(f"{len(left)} files are neither in DVC's cache nor on its remote")
        return [files[each] for each in hashes]

    def _fetch(self, hashes: Collection[str]) -> None:
        from dvc.fs.callbacks import TqdmCallback
        from dvc_data.hashfile.hash_info import HashInfo

        cloud, cache = self._repo.cloud, self._repo.cache.local
        if not self._repo.config["core"].get("remote"):
            raise KoalaError("it is not in DVC's cache, and DVC has no remote")
        with TqdmCallback(desc=f"{self._stage}: fetching what was made last", unit="file") as callback:
            remote = cloud.get_remote_odb(command="fetch")
            wanted = [HashInfo("md5", each) for each in hashes]
            cloud.transfer(remote, cache, wanted, cache_odb=cache, verify=remote.verify, callback=callback)


def find(stage: str, artifact: Path) -> Last | None:
    """Return what a stage made last in the folder `artifact`, if dvc.lock knows."""
    try:
        entry = yaml.load(LOCK.read_text(), Loader=yaml.CSafeLoader)["stages"][stage]
        contents = {out["path"]: out["md5"] for out in entry["outs"]}
        deps = {dep["path"]: dep["md5"] for dep in entry["deps"]}
        return Last(stage, deps, contents[artifact.as_posix()])
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        say(f"{stage}: {LOCK} says nothing of the last run ({type(error).__name__}): all rows are made")
        return None
