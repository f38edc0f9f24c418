"""The commands `koala release ...`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala.commands.options import StudentName

if TYPE_CHECKING:
    from koala.publish.config import PublishConfig

app = typer.Typer(no_args_is_help=True, help="See, verify, approve and roll back releases.")


@app.command("list")
def release_list(
    name: Annotated[str | None, typer.Argument(metavar="STUDENT", help="left out: all")] = None,
) -> None:
    """Show the versions at each target of publish.targets."""
    from koala import params as parameters
    from koala.publish.releases import show_releases

    loaded = parameters.load()
    if name:
        loaded.student(name)
    show_releases(loaded.recipe.publish.targets, [name] if name else list(loaded.students))


@app.command("show")
def release_show(
    name: StudentName,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="such as v3; left out: the latest")] = None,
) -> None:
    """Show what a version is: card, scores, verdicts, provenance, files."""
    settings = _settings(name)
    from koala.publish.releases import show_release

    show_release(settings.targets, name, version)


@app.command("diff")
def release_diff(
    name: StudentName,
    one: Annotated[str, typer.Argument(metavar="A", help="a version, such as v2")],
    other: Annotated[str, typer.Argument(metavar="B", help="another")],
) -> None:
    """Show what two versions differ in: scores, recipe, files."""
    settings = _settings(name)
    from koala.publish.releases import show_difference

    show_difference(settings.targets, name, one, other)


@app.command("verify")
def release_verify(
    name: StudentName,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="such as v3; left out: the latest")] = None,
) -> None:
    """Read a version at each target, and compare it with its manifest."""
    settings = _settings(name)
    from koala.publish.releases import verify

    verify(settings.targets, name, version)


@app.command("rollback")
def release_rollback(
    name: StudentName, version: Annotated[str, typer.Argument(metavar="VERSION", help="such as v3")]
) -> None:
    """Make a version the latest at each target; nothing is deleted."""
    settings = _settings(name)
    from koala import tracking
    from koala.console import say
    from koala.publish.releases import roll_back

    manifest = roll_back(settings.targets, name, version)
    if registered := tracking.set_alias(name, manifest.sha256, "champion"):
        say(f"MLflow: the champion of {name} is version {registered}")


@app.command("judge")
def release_judge(
    name: StudentName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="such as v3")],
    out: Annotated[Path, typer.Option(help="folder for verdict.json, a table and the images beside the champion's")],
) -> None:
    """Judge a version by today's rules, beside the one that stands."""
    settings = _settings(name)
    from koala.console import show
    from koala.publish.promotion import judge_version, show_verdict

    show(show_verdict(judge_version(settings, name, version, out)))


@app.command("approve")
def release_approve(
    name: StudentName,
    because: Annotated[str, typer.Option(help="why")],
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="whose promotion waits; left out: the student, at the gate")
    ] = None,
    by: Annotated[str | None, typer.Option(help="who says so; left out: the account's name")] = None,
) -> None:
    """Let a student out that misses a rule, or a version stand."""
    settings = _settings(name)
    from koala.publish.promotion import approve_version
    from koala.publish.releases import approve
    from koala.runner import artifact

    if version:
        approve_version(name, version, because, by)
        return
    approve(settings, name, artifact("evaluation", name), because, by)


def _settings(student: str) -> "PublishConfig":
    """Return how a student is published. Raises KoalaError for one that params.yaml does not name."""
    from koala import params as parameters

    loaded = parameters.load()
    loaded.student(student)
    return loaded.publish
