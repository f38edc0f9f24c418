"""DVC's graph, read in-process: the stages that a target needs, in an order that can be run.

dvc.yaml owns the graph. This is the one place that asks DVC for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Stage:
    """A stage as DVC knows it. `upstream` names the stages that give what it reads; `outs` are paths from the project's root.

    `retries` is what the stage's `meta` in dvc.yaml says: how often to try again a stage that uses the network.
    """

    name: str
    upstream: tuple[str, ...]
    outs: tuple[Path, ...]
    retries: int


class PipelineError(Exception):
    """There is nothing to run: no such stage, or DVC cannot read its files. Its text is one line."""


def pipeline(target: str) -> list[Stage]:
    """The stage `target` of the current directory's DVC project and all that it needs, each one after what it needs.

    Stages that could run in either order keep that of dvc.yaml. Raises PipelineError.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return _pipeline(repo, target)
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
        )
        for stage in nx.lexicographical_topological_sort(needed.reverse(), key=position.__getitem__)
    ]


def profile() -> str:
    """The profile that params.yaml names."""
    from dvc.api import params_show

    return str(params_show("params.yaml")["profile"])
