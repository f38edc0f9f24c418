"""What a version of a release is, and how two differ: read from the small files that travel with it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from koala.config import flatten
from koala.console import show, text_table
from koala.publish.targets.base import Shelf
from koala.publish.versions import GATE, TRAINING, Manifest

Figure = tuple[float, Sequence[float] | None]
"""A figure, and its 95 % interval where it has one."""

_NONE = "-"


@dataclass(frozen=True)
class Release:
    """A version at a target."""

    student: str
    version: str
    shelf: Shelf

    @cached_property
    def manifest(self) -> Manifest:
        """Its files. Raises KoalaError where there is no such version."""
        return self.shelf.manifest(self.version)

    @cached_property
    def card(self) -> dict[str, Any]:
        """The header of its card."""
        header = (self.shelf.read(self.version, "README.md") or b"").decode().split("---\n", 2)
        found = yaml.safe_load(header[1]) if len(header) > 1 else None
        return found if isinstance(found, dict) else {}

    @cached_property
    def training(self) -> dict[str, Any]:
        """Provenance of its training; empty where there is none."""
        return self._json(TRAINING)

    @cached_property
    def gate(self) -> dict[str, Any]:
        """The verdicts that let it out; empty for a release of an earlier version of koala."""
        return self._json(GATE)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The student's scores and costs, and those beside its teacher's."""
        metrics = self._json("metrics.json")
        intervals = metrics.get("intervals", {})
        own = {name: (value, intervals.get("after", {}).get(name)) for name, value in metrics.get("after", {}).items()}
        compared = {
            name: (value, intervals.get(name)) for name, value in metrics.items() if isinstance(value, int | float)
        }
        return {**own, **compared}

    def _json(self, file: str) -> dict[str, Any]:
        content = self.shelf.read(self.version, file)
        found = json.loads(content) if content else None
        return found if isinstance(found, dict) else {}


def describe(release: Release, stands: Mapping[str, str]) -> None:
    """Print a version: its card's facts, provenance, scores with intervals, verdicts, files.

    stands: Target -> what stands there of it, in words.
    """
    card, training = release.card, release.training
    facts = {
        "licence": card.get("license_name") or card.get("license"),
        "base model": card.get("base_model"),
        "data sets": ", ".join(card.get("datasets") or ()),
        "profile": training.get("profile"),
        "commit": training.get("commit"),
        "MLflow run": training.get("run_id"),
        **{f"target {kind}": where for kind, where in stands.items()},
    }
    show(f"{release.student} {release.version}\n")
    show(_lines([(name, str(value)) for name, value in facts.items() if value]))
    show(
        _table(["figure", "value", "95 % interval"], [[name, *_cells(each)] for name, each in release.figures.items()])
    )
    show(_table(["rule of the gate", "judged", "verdict"], list(_verdicts(release.gate))))
    rows = [[name, f"{file.size:,}", file.sha256[:12]] for name, file in sorted(release.manifest.files.items())]
    show(_table(["file", "bytes", "SHA-256"], rows).rstrip())


def describe_difference(one: Release, other: Release) -> None:
    """Print what differs between two versions: figures side by side, values of the recipe, files.

    Raises KoalaError where there is no such version.
    """
    files = one.manifest.files, other.manifest.files  # raises where there is no such version, before anything is shown
    show(f"{one.student} {one.version} and {other.version}\n")
    figures = one.figures, other.figures
    rows = [[name, *(" ".join(_cells(each.get(name))) for each in figures)] for name in _names(*figures)]
    show(_table(["figure", one.version, other.version], rows))
    recipes = [flatten(each.training.get("config", {})) for each in (one, other)]
    rows = [[name, *(str(each.get(name, _NONE)) for each in recipes)] for name in _differing(*recipes)]
    show(_table(["recipe", one.version, other.version], rows, "the same recipe"))
    rows = [
        [name, *(f"{each[name].size:,}" if name in each else _NONE for each in files)] for name in _differing(*files)
    ]
    show(_table(["file", one.version, other.version], rows, "the same files").rstrip())


def _names(*mappings: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in _names(one, other) if one.get(name) != other.get(name))


def _cells(figure: Figure | None) -> tuple[str, str]:
    """Return a figure and its interval as text: `0.9470`, `(0.9040 to 0.9910)`."""
    if figure is None:
        return _NONE, ""
    value, interval = figure
    return _digits(value), f"({_digits(interval[0])} to {_digits(interval[1])})" if interval else ""


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _verdicts(gate: Mapping[str, Any]) -> Iterator[list[str]]:
    approval = gate.get("approval")
    for rule in gate.get("rules", ()):
        subject = f"{rule['metric']} of {rule['of']}" if rule.get("of") else rule["metric"]
        limit = f"at least {rule['at_least']:g}" if "at_least" in rule else f"at most {rule['at_most']:g}"
        judged = rule["value"] if rule.get("bound") is None else rule["bound"]
        overruled = f"overruled by {approval['by']}" if approval else "failed"
        yield [
            f"{subject} {limit}",
            _NONE if judged is None else _digits(judged),
            "passed" if rule["passed"] else overruled,
        ]


def _lines(facts: Sequence[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in facts), default=0)
    return "".join(f"{name.ljust(width)}  {value}\n" for name, value in facts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], otherwise: str = "") -> str:
    if not rows:
        return f"{otherwise}\n" if otherwise else ""
    return text_table(columns, rows)
