"""The releases of a project: what stands at each target, whether it is whole, and which version is the latest."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from koala.console import say, show, text_table
from koala.errors import KoalaError
from koala.publish import approvals
from koala.publish.champion import champion, verdicts_on
from koala.publish.config import PublishConfig
from koala.publish.targets.base import Shelf, Target


def show_releases(targets: Sequence[Target], students: Sequence[str]) -> None:
    """Print a table of all versions of the students at the targets."""
    rows = []
    for student in students:
        for kind, shelf in _shelves(targets, student):
            latest = shelf.latest()
            for version in shelf.versions():
                files = shelf.manifest(version).files
                size = sum(file.size for file in files.values())
                mark = "latest" if version == latest else ""
                rows.append([student, kind, version, str(len(files)), f"{size / 1e6:,.1f}", mark])
    if rows:
        show(text_table(["student", "target", "version", "files", "MB", ""], rows).rstrip())
    else:
        show(f"no release of {', '.join(students)} yet: publish one (`koala publish STUDENT`)")


def verify(targets: Sequence[Target], student: str, version: str | None) -> None:
    """Read a version at each target and compare it with its manifest; left out, the latest.

    Raises:
        KoalaError: A file is missing or holds other bytes, or there is no such version.
    """
    damage = []
    for kind, shelf in _shelves(targets, student):
        chosen = version or shelf.latest()
        if chosen is None:
            raise KoalaError(f"target {kind} holds no release of {student}: publish one (`koala publish {student}`)")
        if damaged := shelf.damaged(chosen):
            damage.append(f"target {kind}: {chosen} lacks {', '.join(damaged)} as its manifest has it")
        else:
            show(f"{student} {chosen} at target {kind} is whole")
    if damage:
        raise KoalaError(f"{'; '.join(damage)}: publish that release again, or roll back to another version")


def roll_back(targets: Sequence[Target], student: str, version: str) -> None:
    """Let latest.json of each target name `version`, which must be whole. Nothing is deleted.

    Raises:
        KoalaError: A target lacks the version, or holds it damaged. No target is changed then.
    """
    verify(targets, student, version)
    for kind, shelf in _shelves(targets, student):
        before = shelf.latest()
        shelf.point_to(version)
        say(f"target {kind}: the latest {student} is {version}" + (f", was {before}" if before != version else ""))


def approve(config: PublishConfig, student: str, evaluation: Path, because: str, by: str | None) -> None:
    """Record that a person lets a student out though it misses rules of the gate.

    Raises:
        KoalaError: It was not evaluated, it meets every rule, or this evaluation is approved already.
    """
    if not (evaluation / "metrics.json").is_file():
        raise KoalaError(f"{student} was not evaluated: run `koala evaluate {student}` first")
    failed = [verdict for verdict in verdicts_on(evaluation, config, champion(config, student)) if not verdict.passed]
    if not failed:
        raise KoalaError(f"{student} meets every rule of publish.require: `koala publish {student}` releases it")
    if there_is := approvals.find(config.approvals, student, evaluation):
        raise KoalaError(f"{there_is.by} approved this evaluation of {student} already: `koala publish {student}`")
    approval = approvals.add(student, evaluation, because, by)
    show(f"{approval.by} overrules: {'; '.join(map(str, failed))}")
    show(
        f"{approvals.FILE} holds it: commit that file, and run `dvc repro publish@{student}` (or `koala publish {student}`)"
    )


def _shelves(targets: Sequence[Target], student: str) -> Iterator[tuple[str, Shelf]]:
    shelves = [(target.kind, shelf) for target in targets if (shelf := target.shelf(student))]
    if not shelves:
        raise KoalaError("no target keeps versions: name one under publish.targets, such as {folder: {path: releases}}")
    yield from shelves
