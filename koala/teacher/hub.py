"""A pipeline on the Hugging Face Hub, at a pinned revision, and parts of it from other repositories."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from koala.console import say
from koala.errors import DISK_FULL, KoalaError
from koala.teacher.config import SAFETENSORS, WEIGHTS, HubPart
from koala.teacher.layout import MODEL_INDEX, configurations, licence, read_index, weights
from koala.teacher.source import place


class HubSource:
    """A pipeline's repository. Files lie in `cache` once they are there, and are not fetched again."""

    def __init__(self, repository: str, revision: str, cache: Path) -> None:
        self._repository = repository
        self._revision = revision
        self._cache = cache

    def configurations(self, to: Path) -> None:
        """Fetch model_index.json, configurations, vocabularies and the licence into the folder `to`."""
        say(f"teacher: {self._repository} at {self._revision[:8]}")
        self._fetch([MODEL_INDEX])
        parts = read_index(self._cache, self._repository)
        files = {MODEL_INDEX: MODEL_INDEX} | configurations(self._files, parts) | licence(self._files)
        self._fetch(files)
        place(files, self._cache, to)

    def weights(self, to: Path, parts: Collection[str]) -> None:
        """Fetch the weights of `parts` into `to`."""
        files: dict[str, str] = {}
        for part in parts:
            files |= weights(self._files, part, self._repository)
        self._fetch(files)
        place(files, self._cache, to, link=True)

    @cached_property
    def _files(self) -> list[str]:
        from huggingface_hub import HfApi

        with _errors(self._repository):
            return HfApi().list_repo_files(self._repository, revision=self._revision)

    def _fetch(self, files: Iterable[str]) -> None:
        _fetch(self._repository, self._revision, files, self._cache)


def head(repository: str, branch: str) -> str:
    """Return the commit that a branch of a repository is at. Raises KoalaError, in one line, where the Hub does not say."""
    from huggingface_hub import HfApi

    with _errors(repository):
        return str(HfApi().model_info(repository, revision=branch).sha)


def place_part(name: str, part: HubPart, to: Path, cache: Path, suffix: str) -> None:
    """Fetch the files of `part` that end with `suffix` (`.json`, or safetensors), as the part `name` of the pipeline in `to`."""
    files = [file for file in part.files if file.endswith(suffix)]
    if not files:
        return
    say(f"teacher: its {name} from {part.repository} at {part.revision[:8]}")
    _fetch(part.repository, part.revision, files, cache)
    targets = {file: f"{name}/{WEIGHTS if file.endswith(SAFETENSORS) else Path(file).name}" for file in files}
    with _errors(part.repository):  # a file that the repository lacks is seen here
        place(targets, cache, to, link=True)


def _fetch(repository: str, revision: str, files: Iterable[str], cache: Path) -> None:
    from huggingface_hub import snapshot_download

    with _errors(repository):
        snapshot_download(repository, revision=revision, local_dir=cache, allow_patterns=list(files))


@contextmanager
def _errors(repository: str) -> Iterator[None]:
    """Raise KoalaError, in one line, if the Hub cannot be reached or does not give the files."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise KoalaError(
            f"cannot fetch the teacher's {repository} from the Hugging Face Hub ({_reason(error)}): "
            "check the names, the network and `hf auth login`, or use `profile: demo`, which needs none of them"
        ) from None


def _reason(error: Exception) -> str:
    missing = isinstance(error, FileNotFoundError) and error.filename
    return f"it has no {Path(missing).name}" if missing else type(error).__name__
