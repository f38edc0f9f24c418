"""The releases of a project: what stands at each target, whether it is whole, and which version is the latest."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from koala.console import say, show, text_table
from koala.errors import KoalaError
from koala.publish import approvals
from koala.publish.champion import champion, verdicts_on
from koala.publish.config import PublishConfig
from koala.publish.describe import Release, describe, describe_difference
from koala.publish.targets.base import Shelf, Target
from koala.publish.targets.folder import FolderShelf
from koala.publish.versions import Manifest


def show_releases(targets: Sequence[Target], students: Sequence[str]) -> None:
    """Print a table of all versions of the students at the targets. Equal contents are the same release, whatever its version."""
    rows = []
    for student in students:
        for kind, shelf in _shelves(targets, student):
            latest = shelf.latest()
            for version in shelf.versions():
                try:
                    manifest = shelf.manifest(version)
                except KoalaError:  # a tag of someone else's in a repository of the Hub, or a damaged file
                    rows.append([student, kind, version, "", "", "", "no manifest that koala can read"])
                    continue
                size = sum(file.size for file in manifest.files.values())
                missing = shelf.missing(version)
                marks = ["latest"] * (version == latest) + [f"broken: {len(missing)} files missing"] * bool(missing)
                figures = [str(len(manifest.files)), f"{size / 1e6:,.1f}", manifest.sha256[:8]]
                rows.append([student, kind, version, *figures, ", ".join(marks)])
            rows += [[student, kind, candidate, "", "", "", "not merged"] for candidate in shelf.candidates()]
    if rows:
        show(text_table(["student", "target", "version", "files", "MB", "content", ""], rows).rstrip())
    else:
        show(f"no release of {', '.join(students)} yet: publish one (`koala publish STUDENT`)")


def show_release(targets: Sequence[Target], student: str, version: str | None) -> None:
    """Print what a version is, and which versions of the targets hold the same. Left out: the latest of the first target.

    Raises:
        KoalaError: There is no such version.
    """
    release = _release(targets, student, version)
    stands = {}
    for kind, shelf in _shelves(targets, student):
        held = shelf.holding(release.manifest)
        stands[kind] = f"{held}{' (latest)' if held == shelf.latest() else ''}" if held else "not there"
    describe(release, stands)


def show_difference(targets: Sequence[Target], student: str, one: str, other: str) -> None:
    """Print what two versions differ in. Raises KoalaError where there is none of that name."""
    describe_difference(_release(targets, student, one), _release(targets, student, other))


def folder_of(targets: Sequence[Target], student: str, version: str | None) -> Path:
    """Return the folder of a release at a target of kind `folder`; left out, the latest version.

    Raises:
        KoalaError: No such target holds one.
    """
    shelves = [shelf for _, shelf in _shelves(targets, student) if isinstance(shelf, FolderShelf)]
    for shelf in shelves:
        chosen = version or shelf.latest()
        if chosen in shelf.versions():
            return shelf.place / str(chosen)
    there_are = sorted({each for shelf in shelves for each in shelf.versions()})
    raise KoalaError(
        f"{student} has no release {version or 'that stands'} in a folder: "
        + (f"choose one of {', '.join(there_are)}" if there_are else f"publish one (`koala publish {student}`)")
    )


def verify(targets: Sequence[Target], student: str, version: str | None) -> None:
    """Read a version at each target and compare it with its manifest; left out, the latest.

    Raises:
        KoalaError: A file is missing or holds other bytes, or there is no such version.
    """
    chosen = []
    for kind, shelf in _shelves(targets, student):
        chosen.append((kind, shelf, version or _standing(student, kind, shelf)))
    _check(student, chosen)


def roll_back(targets: Sequence[Target], student: str, version: str) -> Manifest:
    """Let each target's latest be what `version` is at the first target. It must be whole. Nothing is deleted.

    Returns:
        What the version holds.

    Raises:
        KoalaError: A target lacks it, or holds it damaged. No target is changed then.
    """
    shelves = list(_shelves(targets, student))
    (first, shelf), *_ = shelves
    manifest = shelf.manifest(version)
    chosen = []
    for kind, shelf in shelves:
        held = version if kind == first else shelf.holding(manifest)
        if held is None:
            raise KoalaError(
                f"target {kind} does not hold {student} {version} of target {first}: choose another version "
                "(`koala release list`), or publish that release again"
            )
        chosen.append((kind, shelf, held))
    _check(student, chosen)
    for kind, shelf, held in chosen:
        before = shelf.latest()
        shelf.point_to(held)
        say(
            f"target {kind}: the latest {student} is {held}" + (f", was {before}" if before not in (None, held) else "")
        )
    return manifest


def _check(student: str, chosen: Sequence[tuple[str, Shelf, str]]) -> None:
    """Read versions at their targets. Raises KoalaError where one is damaged."""
    damage = []
    for kind, shelf, version in chosen:
        if damaged := shelf.damaged(version):
            damage.append(f"target {kind}: {version} lacks {', '.join(damaged)} as its manifest has it")
        else:
            show(f"{student} {version} at target {kind} is whole")
    if damage:
        raise KoalaError(f"{'; '.join(damage)}: publish that release again, or roll back to another version")


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


def _release(targets: Sequence[Target], student: str, version: str | None) -> Release:
    """Return a version at the first target that has it; left out, the latest of the first."""
    shelves = list(_shelves(targets, student))
    for kind, shelf in shelves:
        chosen = version or _standing(student, kind, shelf)
        if chosen in shelf.versions():
            return Release(student, chosen, shelf)
    return Release(student, str(version), shelves[0][1])  # whose manifest says which versions there are


def _standing(student: str, kind: str, shelf: Shelf) -> str:
    """Return the latest version at a target. Raises KoalaError with the candidates that there are."""
    if latest := shelf.latest():
        return latest
    if candidates := shelf.versions():
        raise KoalaError(
            f"no release of {student} stands at target {kind}: name a candidate ({', '.join(candidates)}), or promote one "
            "(docs/team.md)"
        )
    raise KoalaError(f"target {kind} holds no release of {student}: publish one (`koala publish {student}`)")


def _shelves(targets: Sequence[Target], student: str) -> Iterator[tuple[str, Shelf]]:
    shelves = [(target.kind, shelf) for target in targets if (shelf := target.shelf(student))]
    if not shelves:
        raise KoalaError("no target keeps versions: name one under publish.targets, such as {folder: {path: releases}}")
    yield from shelves
