"""The Hugging Face Hub as a target: a model repository a student, a tag a version.

A release is a pull request on the commit that was the head. Its files are read back and compared before it is merged and
tagged; where another version stays in `main`, it is tagged and closed. Where the head moved meanwhile, the pull request is made
anew on it, unless another release stands there now: the gate did not compare with that one. Whoever publishes the same release
again, after a broken upload too, finds its tag or its open pull request, and the Hub keeps the large files that arrived. Nothing
is deleted from the repository's history: a rollback is a commit that restores files.

The token and the address come from the environment alone (HF_TOKEN or `hf auth login`, HF_ENDPOINT).
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from koala.console import say
from koala.errors import DISK_FULL, KoalaError
from koala.publish.targets.base import Shelf, Target
from koala.publish.versions import MANIFEST, Manifest, after, no_such_version, numbered

T = TypeVar("T")

_MAIN = "main"
_TITLE = "Release"  # of a pull request, before the start of its manifest's SHA-256
_ATTEMPTS = 4
_LONGEST_PAUSE = 60.0  # seconds that a Retry-After may ask for
_FIRST_PAUSE = 1.0  # seconds before the second attempt, doubled each time
_TRANSIENT = (429, 500, 502, 503, 504)
_PRECONDITION_FAILED = 412  # parent_commit is no longer the head
_KEPT = (".gitattributes",)  # the Hub's own file
_HEADS = 3  # that a release is put on before it gives up: someone edits faster than it is sent


class HubTarget(Target):
    """Versions of releases in model repositories of the Hub: `OWNER/NAME`, with the tags `v1`, `v2`, ..."""

    kind: Literal["hub"] = "hub"
    """Name of the kind."""

    owner: str = Field(pattern=r"^[\w.-]+$")
    """User or organisation. Each student has a repository of its name."""

    private: bool = True
    """Whether a repository that is created is private. One that is there stays as it is."""

    def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
        """Publish the release as a new version, or find the one that holds it; if it `stands`, let `main` hold it.

        Returns its `version`, `repository` and `commit`. Raises KoalaError where the Hub does not let us, and where another
        release came to stand meanwhile.
        """
        shelf = self.shelf(name)
        with _explained(shelf.repository):
            manifest = Manifest.of(release)
            shelf.create(self.private)
            version = shelf.holding(manifest)
            if version is None:
                version = shelf.tag(shelf.merge(release, manifest)) if stands else shelf.keep(release, manifest)
            elif stands and shelf.latest() != version:
                shelf.point_to(version)
            return {"version": version, "repository": shelf.repository, "commit": shelf.commit(version)}

    def shelf(self, name: str) -> "HubShelf":
        """Return the versions of student `name`."""
        return HubShelf(f"{self.owner}/{name}")


class HubShelf(Shelf):
    """The versions of one student in a repository."""

    def __init__(self, repository: str) -> None:
        """Take the tags of `repository`, which need not exist."""
        from huggingface_hub import HfApi

        self.repository = repository
        self._hub = HfApi()

    def versions(self) -> list[str]:
        """Return the versions, the oldest first."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with _explained(self.repository):
            try:
                return numbered(self._tags())
            except RepositoryNotFoundError:
                return []

    def latest(self) -> str | None:
        """Return the newest version that holds what `main` holds."""
        if not (versions := self.versions()):
            return None
        with _explained(self.repository):
            now = self._manifest(_MAIN)
            return next((each for each in reversed(versions) if self._manifest(each) == now), None) if now else None

    def manifest(self, version: str) -> Manifest:
        """Return what a version holds."""
        with _explained(self.repository):
            found = self._manifest(version) if version in self.versions() else None
        if found is None:
            raise KoalaError(no_such_version(version, self.repository, self.versions()))
        return found

    def read(self, version: str, file: str) -> bytes | None:
        """Return the content of a small file of a version."""
        content = io.BytesIO()
        with _explained(self.repository):
            return content.getvalue() if self._stream(version, file, content.write) else None

    def sha256(self, version: str, file: str) -> str | None:
        """Read a file of a version and return its SHA-256."""
        digest = hashlib.sha256()
        with _explained(self.repository):
            return digest.hexdigest() if self._stream(version, file, digest.update) else None

    def sizes(self, version: str) -> dict[str, int]:
        """Return the bytes of each file of a version."""
        with _explained(self.repository):
            info = _patiently(lambda: self._hub.model_info(self.repository, revision=version, files_metadata=True))
        return {file.rfilename: int(file.size or 0) for file in info.siblings or ()}

    def candidates(self) -> list[str]:
        """Return the open pull requests that releases are in."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with _explained(self.repository):
            try:
                found = self._pull_requests()
            except RepositoryNotFoundError:
                return []
        return [f"pull request {each.num}" for each in found if each.title.startswith(f"{_TITLE} ")]

    def holding(self, manifest: Manifest) -> str | None:
        """Return the newest version that holds these files."""
        return next((each for each in reversed(self.versions()) if self._manifest(each) == manifest), None)

    def point_to(self, version: str) -> None:
        """Let `main` hold a version again, by a commit that restores its files from its tag."""
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        wanted = self.manifest(version)
        with _explained(self.repository):
            head, files = self._head()
            restored = [
                CommitOperationCopy(name, name, src_revision=version) for name in sorted({*wanted.files, MANIFEST})
            ]
            removed = [CommitOperationDelete(name) for name in sorted(files - {*wanted.files, MANIFEST, *_KEPT})]
            self._commit([*restored, *removed], f"Restore {version}", head)

    def create(self, private: bool) -> None:
        """Create the repository, if it is not there."""
        _patiently(lambda: self._hub.create_repo(self.repository, private=private, exist_ok=True))

    def commit(self, version: str) -> str:
        """Return the commit of a version."""
        return self._tags()[version]

    def tag(self, commit: str) -> str:
        """Name a commit as the version after all others. Return the version; another publisher may take one first."""
        while True:
            version = after(self.versions())
            _patiently(partial(self._hub.create_tag, self.repository, tag=version, revision=commit, exist_ok=True))
            if self.commit(version) == commit:
                return version

    def merge(self, release: Path, manifest: Manifest) -> str:
        """Bring a release into `main` by a pull request, made anew where the head moved. Return the commit.

        Raises:
            KoalaError: What the Hub holds is not what was sent, another release came to stand, or `main` does not rest.
        """
        stood = self._manifest(_MAIN)
        for _ in range(_HEADS):
            head, files = self._head()
            now = self._manifest(head)
            if now == manifest:
                return head  # merged by a publisher that ended before it tagged
            if now != stood:
                break
            number = self._compared(release, manifest, head, files)
            if number is None:
                continue
            if self._head()[0] != head:
                self._close(number)  # it would take back what came to `main`
                continue
            _patiently(partial(self._hub.merge_pull_request, self.repository, number))
            merged, _ = self._head()
            if self._manifest(merged) == manifest:
                return merged
            break
        raise KoalaError(
            f"another publisher moved {self.repository} to {self._head()[0][:8]} meanwhile: publish again if this release "
            "shall be the latest"
        )

    def keep(self, release: Path, manifest: Manifest) -> str:
        """Tag a release in a pull request that is closed unmerged: the tag keeps the commit. Return the version."""
        number = None
        while number is None:
            number = self._compared(release, manifest, *self._head())
        info = _patiently(lambda: self._hub.model_info(self.repository, revision=f"refs/pr/{number}"))
        version = self.tag(str(info.sha))
        self._close(number)
        return version

    def _compared(self, release: Path, manifest: Manifest, head: str, files: set[str]) -> int | None:
        """Return the pull request of a release, new or found again, after its files were read back and compared.

        None where the Hub does not take it, since the head moved.
        """
        title = f"{_TITLE} {manifest.sha256[:16]}"
        number = self._candidate(title, head)
        if number is not None:
            say(f"publish: goes on with pull request {number} of {self.repository}")
        elif (number := self._propose(release, manifest, title, head, files)) is None:
            return None
        if damaged := self.damaged(f"refs/pr/{number}"):
            self._close(number)
            raise KoalaError(
                f"{self.repository} holds other bytes of {', '.join(damaged)} than were sent: its pull request {number} is "
                "closed: publish again"
            )
        return number

    def _close(self, number: int) -> None:
        _patiently(lambda: self._hub.change_discussion_status(self.repository, number, "closed"))

    def damaged(self, version: str) -> list[str]:
        """Return the files of a version, or of a pull request, that are missing or hold other bytes. Reads all of them."""
        if version.startswith("refs/"):
            manifest = self._manifest(version)
            found = manifest.files if manifest else {}
            return [name for name in sorted(found) if self.sha256(version, name) != found[name].sha256] or (
                [] if manifest else [MANIFEST]
            )
        return super().damaged(version)

    def _candidate(self, title: str, head: str) -> int | None:
        """Return the open pull request of this release, of which the upload may have broken after it was made."""
        found = self._pull_requests()
        return next((each.num for each in found if each.title == f"{title} on {head[:16]}"), None)

    def _pull_requests(self) -> list[Any]:
        """Return the open pull requests."""
        return _patiently(
            lambda: list(
                self._hub.get_repo_discussions(
                    self.repository, discussion_type="pull_request", discussion_status="open"
                )
            )
        )

    def _propose(self, release: Path, manifest: Manifest, title: str, head: str, files: set[str]) -> int | None:
        """Upload the release as a pull request on `head`. Return its number; None where that is no longer the head."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        size = sum(file.size for file in manifest.files.values())
        say(f"publish: {size / 1e9:.2f} GB to {self.repository}")
        added = [CommitOperationAdd(name, str(release / name)) for name in sorted(manifest.files)]
        added.append(CommitOperationAdd(MANIFEST, manifest.text().encode()))
        removed = [CommitOperationDelete(name) for name in sorted(files - {*manifest.files, MANIFEST, *_KEPT})]
        try:
            made = self._commit([*added, *removed], f"{title} on {head[:16]}", head, create_pr=True)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != _PRECONDITION_FAILED:
                raise
            return None
        assert made.pr_num is not None
        return int(made.pr_num)

    def _commit(self, operations: list[Any], message: str, head: str, create_pr: bool = False) -> Any:
        return _patiently(
            lambda: self._hub.create_commit(
                self.repository, operations, commit_message=message, parent_commit=head, create_pr=create_pr
            )
        )

    def _head(self) -> tuple[str, set[str]]:
        """Return the commit of `main`, and its files."""
        info = _patiently(lambda: self._hub.model_info(self.repository, revision=_MAIN))
        return str(info.sha), {file.rfilename for file in info.siblings or ()}

    def _tags(self) -> dict[str, str]:
        refs = _patiently(lambda: self._hub.list_repo_refs(self.repository))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def _manifest(self, revision: str) -> Manifest | None:
        content = io.BytesIO()
        if not self._stream(revision, MANIFEST, content.write):
            return None
        return Manifest.read(content.getvalue(), f"{self.repository}/{MANIFEST} at {revision}")

    def _stream(self, revision: str, file: str, take: Callable[[bytes], Any]) -> bool:
        """Give the content of a file to `take`, piece by piece. Return False where there is no such file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, file, revision=revision)

        def open_and_read() -> bool:
            with get_session().stream("GET", url, headers=build_hf_headers(), follow_redirects=True) as answer:
                try:
                    hf_raise_for_status(answer)
                except (EntryNotFoundError, RevisionNotFoundError):
                    return False
                for piece in answer.iter_bytes():
                    take(piece)
                return True

        return _patiently(open_and_read)


def _patiently(call: Callable[[], T]) -> T:
    """Call again after 429 and a server's errors, as late as the Hub asks. What was uploaded is not sent again."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in _TRANSIENT or attempt == _ATTEMPTS - 1:
                raise
            asked = str(error.response.headers.get("Retry-After", ""))
            pause = float(asked) if asked.isdigit() else _FIRST_PAUSE * 2**attempt
            if pause > _LONGEST_PAUSE:
                raise
            say(f"publish: the Hub answers {status}: again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import get_token  # type: ignore[attr-defined]

    if get_token() is None:
        raise KoalaError(f"no token for {repository} on the Hugging Face Hub: set HF_TOKEN, or run `hf auth login`")
    try:
        yield
    except RepositoryNotFoundError:
        raise KoalaError(
            f"there is no {repository} on the Hugging Face Hub, or this token may not see it: check publish.targets.hub.owner "
            "and HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the token is not valid: check HF_TOKEN",
            403: "this token may not write there: use one with write access to that owner",
            409: "it changed meanwhile: run the same command again",
            _PRECONDITION_FAILED: "another publisher moved it meanwhile: run the same command again",
            429: "too many requests: publish again later, it resumes",
        }
        reason = reasons.get(status, f"it answers {status}: publish again, it resumes")
        raise KoalaError(f"cannot use {repository} on the Hugging Face Hub: {reason}") from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise KoalaError(
            f"cannot reach the Hugging Face Hub for {repository} ({type(error).__name__}): publish again, it resumes"
        ) from None
