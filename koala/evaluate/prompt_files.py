"""Prompt sets in files, the formats of the public ones among them.

| file | prompts | as in |
|---|---|---|
| `.jsonl` | a mapping a line: `prompt`, and `category` and `chunks` where there are some | infra/prompts.jsonl |
| `.txt` | a line each | T2I-CompBench |
| `.tsv` | the column `Prompt`, and `Category` where there is one | PartiPrompts |
| `.json` | a list of texts, or COCO's `annotations` with a `caption` each | HPSv2's, COCO |

Several files are one set: each is a category, called as the file, unless the file itself names categories.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from koala.errors import DISK_FULL, KoalaError
from koala.evaluate.prompts import PromptSet, Written
from koala.teacher.config import Revision


class FilePrompts(PromptSet):
    """Prompts of a file, of a folder's files, or of the files of a pattern."""

    kind: Literal["file"] = "file"
    """Name of the kind."""

    path: Path
    """The file or the folder, relative to the current folder. The last part may be a pattern: `dataset/*_val.txt`."""

    def load(self) -> list[Written]:
        """Return the prompts. Raises KoalaError where there are none, or where a file cannot be read."""
        if self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if file.suffix in _READERS)
        elif self.path.exists():
            files = [self.path]
        elif not (files := sorted(self.path.parent.glob(self.path.name))):
            raise KoalaError(
                f"evaluate.prompts names {self.path}, which is not there: give a file with a prompt a line, or a folder"
            )
        return _read(files, str(self.path))


class HubPrompts(PromptSet):
    """Prompts of a data set on the Hugging Face Hub, at a pinned revision."""

    kind: Literal["hub"] = "hub"
    """Name of the kind."""

    repository: str
    """The data set, as `owner/name`."""

    revision: Revision
    """The commit, 40 hexadecimal digits."""

    files: tuple[str, ...] = Field(min_length=1)
    """Its files that hold prompts; of several, each is a category."""

    def load(self) -> list[Written]:
        """Return the prompts. Raises KoalaError where the files cannot be had, or hold none."""
        from huggingface_hub import hf_hub_download

        try:
            paths = [
                Path(hf_hub_download(self.repository, file, revision=self.revision, repo_type="dataset"))
                for file in self.files
            ]
        except (OSError, ValueError) as error:  # the Hub's own errors are OSErrors
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            raise KoalaError(
                f"cannot fetch the prompts of {self.repository} from the Hugging Face Hub ({type(error).__name__}): check "
                "evaluate.prompts and the network, or use a file"
            ) from None
        return _read(paths, self.repository)


def _read(files: list[Path], origin: str) -> list[Written]:
    """Return the prompts of files of one set."""
    found = []
    for file in files:
        reader = _READERS.get(file.suffix)
        if reader is None:
            raise KoalaError(f"{file} (evaluate.prompts) has no known format: give one of {', '.join(_READERS)}")
        try:
            category = file.stem if len(files) > 1 else ""
            found += [
                Written(each.text.strip(), each.category or category, each.chunks)
                for each in reader(file.read_text(encoding="utf-8-sig"))  # some editors begin it with a mark
                if each.text.strip()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise KoalaError(
                f"{file} (evaluate.prompts) cannot be read as {file.suffix} of prompts: {reason}"
            ) from None
    if not found:
        raise KoalaError(f"{origin} (evaluate.prompts) holds no prompt: write one a line")
    return found


def _lines(text: str) -> Iterator[Written]:
    return (Written(line) for line in text.split("\n"))


def _json_lines(text: str) -> Iterator[Written]:
    # Not by splitlines: other separators of lines, such as U+2028, may stand within a text of JSON.
    for line in filter(str.strip, text.split("\n")):
        row: Mapping[str, Any] = json.loads(line)
        chunks = row.get("chunks") or []
        if not isinstance(chunks, list):
            raise TypeError(f"chunks must be a list, not {chunks!r}")
        category = row.get("category")
        yield Written(_text(row["prompt"]), "" if category is None else str(category), tuple(map(_text, chunks)))


def _tab_separated(text: str) -> Iterator[Written]:
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        yield Written(row["Prompt"], row.get("Category") or "")


def _json(text: str) -> Iterator[Written]:
    document = json.loads(text)
    if isinstance(document, Mapping):
        document = [annotation["caption"] for annotation in document["annotations"]]
    return (Written(_text(each)) for each in document)


def _text(value: Any) -> str:
    """Return a prompt or a chunk of one. Raises TypeError for what is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


_READERS: dict[str, Callable[[str], Iterator[Written]]] = {
    ".jsonl": _json_lines,
    ".txt": _lines,
    ".tsv": _tab_separated,
    ".json": _json,
}
