"""params.yaml as a file: read strictly, and what does not fit said in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from koala.errors import KoalaError


class _Loader(yaml.CSafeLoader):
    """YAML's safe loader that refuses a key that stands twice, as DVC does; by itself it takes the last, unsaid."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        _refuse_repeated(node, set())
        return node


def _refuse_repeated(node: yaml.Node | None, seen: set[int]) -> None:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):  # an alias may lead back
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item, seen)
        return
    names = set()
    for key, value in node.value:
        if key.value in names:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
        if isinstance(key, yaml.ScalarNode):
            names.add(key.value)
        _refuse_repeated(value, seen)


def read(path: Path) -> dict[str, Any]:
    """Return the content of `path`. Raises KoalaError where it is missing, not UTF-8, not YAML or no mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise KoalaError(f"there is no {path} here: run koala in the project's folder") from None
    except UnicodeDecodeError as error:
        raise KoalaError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as such") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise KoalaError(f"{path} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise KoalaError(f"{path} must be a mapping with 'profile', 'machine', 'students', 'profiles' and 'machines'")
    return values


def complaints(path: Path, error: ValidationError, root: Sequence[str] = ()) -> str:
    """Return the first few of pydantic's complaints, each with the parameter's full name."""
    found = []
    for complaint in error.errors()[:3]:
        names = [*root, *(str(part) for part in complaint["loc"] if not isinstance(part, int))]
        what = (
            "no such parameter"
            if complaint["type"] == "extra_forbidden"
            else complaint["msg"].removeprefix("Value error, ")
        )
        found.append(f"{'.'.join(names)}: {what[0].lower()}{what[1:]}")
    more = error.error_count() - len(found)
    return f"{path}: " + "; ".join(found) + (f" (and {more} more)" if more else "")
