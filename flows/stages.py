"""DVC's graph, read in-process: the stages that a target needs, in an order that can be run.

dvc.yaml owns the graph. This is the one place that asks DVC for it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import yaml

if TYPE_CHECKING:
    from dvc.repo import Repo

LAST_STAGE = "publish"
"""The stage that a student's flow brings up to date, with all that it needs."""

LOCK = Path("dvc.lock")
"""DVC's record of the stages that have run."""
DEFAULT_POOL = "cpu"
"""Pool of a stage whose `meta` in dvc.yaml names none."""


@dataclass(frozen=True)
class Stage:
    """A stage as DVC knows it."""

    name: str
    upstream: tuple[str, ...]
    """The stages that make what it reads."""
    outs: tuple[Path, ...]
    """Paths from the project's root."""
    retries: int
    """How often to retry a stage that uses the network: `retries` in the stage's `meta` in dvc.yaml."""

    pool: str
    """The pool of machines that runs it, where a flow uses pools: `pool` in the stage's `meta` in dvc.yaml."""

    @property
    def folder(self) -> Path:
        """The folder that holds what the stage makes: its only out, or the parent that its outs share."""
        return Path(os.path.commonpath(self.outs))


class PipelineError(Exception):
    """There is nothing to run: no such stage, or DVC cannot read its files. Its text is one line."""


def pipeline(target: str) -> list[Stage]:
    """Return the stage `target` of the current directory's DVC project and all that it needs, each after what it needs.

    Stages that could run in either order keep that of dvc.yaml. Raises PipelineError.
    """
    with _repo() as repo:
        return _pipeline(repo, target)


def students() -> list[str]:
    """Return the students of the current directory's DVC project, in dvc.yaml's order. Raises PipelineError."""
    with _repo() as repo:
        names = [stage.addressing.partition("@") for stage in repo.index.stages]
    return [student for stage, _, student in names if stage == LAST_STAGE and student]


def all_stages() -> list[Stage]:
    """Return every stage of the current directory's DVC project. Raises PipelineError."""
    with _repo() as repo:
        names = [stage.addressing for stage in repo.index.stages]
        return list({stage.name: stage for name in names for stage in _pipeline(repo, name)}.values())


@contextmanager
def _repo() -> Iterator["Repo"]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise PipelineError(f"{' '.join(str(error).split())}: `dvc stage list` says more") from None


def _pipeline(repo: "Repo", target: str) -> list[Stage]:
    position = {stage: index for index, stage in enumerate(repo.index.stages)}
    named = {stage.addressing: stage for stage in position}
    if target not in named:
        alike = [name for name in named if name.partition("@")[0] == target.partition("@")[0]]
        raise PipelineError(f"dvc.yaml has no stage {target!r}: choose one of {', '.join(alike or named)}")
    graph = repo.index.graph  # an edge leads from a stage to one that it needs
    needed = graph.subgraph({named[target], *nx.descendants(graph, named[target])})
    return [
        Stage(
            name=stage.addressing,
            upstream=tuple(sorted(other.addressing for other in needed.successors(stage))),
            outs=tuple(Path(str(out)) for out in stage.outs),
            retries=(stage.meta or {}).get("retries", 0),
            pool=(stage.meta or {}).get("pool", DEFAULT_POOL),
        )
        for stage in nx.lexicographical_topological_sort(needed.reverse(), key=position.__getitem__)
    ]


def profile() -> str:
    """Return the profile that params.yaml names."""
    return str(_params()["profile"])


def machine() -> str:
    """Return the machine that KOALA_MACHINE names, or params.yaml; empty where neither does."""
    return os.environ.get("KOALA_MACHINE") or str(_params().get("machine") or "")


def _params() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    return found
