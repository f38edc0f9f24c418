"""Reasons to retrain: the source's content, the teacher's branch, the filter's report beside the champion's, the champion itself.

A cause is found without changing anything. Its change is then made in a worktree, and committed.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala import params as parameters
from koala import tracking
from koala.data import pins
from koala.data.tables import TableSource
from koala.data.update import changes, pin, resolve
from koala.errors import KoalaError
from koala.evaluate.config import EvaluateConfig
from koala.params import Params
from koala.teacher.config import HubTeacher
from koala.teacher.hub import head
from koala.watch import drift

_REPORT = "report.json"


@dataclass(frozen=True)
class Cause:
    """A reason to retrain."""

    name: str
    """The change in a few words."""
    state: str
    """Text that differs from one change of its kind to the next."""
    apply: Callable[[Path], Sequence[str]]
    """Makes the change in a worktree, and returns lines that say what it is."""


def key_of(causes: Sequence[Cause]) -> str:
    """Return what tells these causes from others."""
    states = [[cause.name, cause.state] for cause in causes]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def find(tree: Path) -> list[Cause]:
    """Return the causes that there are, beside what is committed in the worktree `tree`.

    A list on disk is found from the current folder: the checkout. Raises KoalaError where something cannot be reached.
    """
    params = parameters.load(tree / parameters.FILE)
    found = [_source(params, tree), _teacher(params), _filter(params), _champion(params)]
    return [cause for cause in found if cause]


def _source(params: Params, tree: Path) -> Cause | None:
    config = params.recipe.source
    if not isinstance(config, TableSource):
        return None
    content, before = resolve(config), pins.read(tree / pins.FILE).get(params.profile)
    if content.is_pinned(before):
        return None

    def move(tree: Path) -> list[str]:
        now = pin(config, content)
        pins.write({**pins.read(tree / pins.FILE), params.profile: now}, tree / pins.FILE)
        return changes(before, now)

    return Cause(f"{params.profile}: new data", content.digest, move)


def _teacher(params: Params) -> Cause | None:
    teacher = params.recipe.teacher
    if params.watch.teacher is None:
        return None
    if not isinstance(teacher, HubTeacher):
        raise KoalaError(
            f"watch.teacher is for a teacher of kind 'hub', and that of {params.profile} is {teacher.kind!r}"
        )
    now = head(teacher.repository, params.watch.teacher)
    if now == teacher.revision:
        return None

    def move(tree: Path) -> list[str]:
        file = tree / parameters.FILE
        # As text, which keeps comments and anchors. A commit's id stands for no other repository's.
        file.write_text(file.read_text().replace(teacher.revision, now))
        return [f"{teacher.repository}: {teacher.revision} -> {now}"]

    return Cause(f"{params.profile}: new teacher", now, move)


def _filter(params: Params) -> Cause | None:
    limits = params.watch.filter
    if not limits.model_dump(exclude_none=True):
        return None
    experiment = f"koala-{params.profile}"
    newest = tracking.newest_run(experiment, {"stage": "filter"})
    if newest is None:
        return None
    lines = {}
    for student in params.students:
        then = _filter_of_champion(experiment, student)
        if then and then != newest[0] and (found := drift(limits, _report(newest[0]), _report(then))):
            lines[then] = found
    if not lines:
        return None
    content = newest[1].get("data_hash", newest[0])
    said = [line for found in lines.values() for line in found]
    return Cause(f"{params.profile}: the filter's report", content, lambda _: list(dict.fromkeys(said)))


def _champion(params: Params) -> Cause | None:
    scores = params.watch.champion.scores
    if not scores:
        return None
    from koala.publish.champion import standing
    from koala.publish.remeasure import fallen

    config = params.config("evaluate")
    assert isinstance(config, EvaluateConfig)
    lines, releases = [], []
    for student in params.students:
        if (champion := standing(params.recipe.publish.targets, student)) and (
            found := fallen(config, champion, scores)
        ):
            lines += found
            releases.append(f"{student} {champion.shelf.manifest(champion.version).sha256}")
    # The same release is one cause, whatever it scores today.
    name = f"{params.profile}: the champion is below its own interval"
    return Cause(name, " ".join(releases), lambda _: lines) if lines else None


def _filter_of_champion(experiment: str, student: str) -> str | None:
    """Return the run of the filter whose samples the champion was trained on: by the hashes of latents and kept samples."""
    champion = tracking.champion(student)
    latents = champion.get("data_hash.latents")
    encoded = latents and tracking.newest_run(experiment, {"stage": "encode", "data_hash": latents})
    kept = encoded and encoded[1].get("data_hash.kept")
    filtered = kept and tracking.newest_run(experiment, {"stage": "filter", "data_hash": kept})
    return filtered[0] if filtered else None


def _report(run: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = tracking.fetch(run, _REPORT, Path(folder))
        if file is None:
            raise KoalaError(f"the filter's MLflow run {run} holds no {_REPORT}: run the filter again")
        found: dict[str, Any] = json.loads(file.read_text())
        return found
