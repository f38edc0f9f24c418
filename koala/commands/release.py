"""The commands `koala release ...`."""

from pathlib import Path
from typing import Annotated

import typer

from koala.commands.options import StudentName

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
    from koala import params as parameters
    from koala.publish.releases import show_release

    loaded = parameters.load()
    loaded.student(name)
    show_release(loaded.recipe.publish.targets, name, version)


@app.command("diff")
def release_diff(
    name: StudentName,
    one: Annotated[str, typer.Argument(metavar="A", help="a version, such as v2")],
    other: Annotated[str, typer.Argument(metavar="B", help="another")],
) -> None:
    """Show what two versions differ in: scores, recipe, files."""
    from koala import params as parameters
    from koala.publish.releases import show_difference

    loaded = parameters.load()
    loaded.student(name)
    show_difference(loaded.recipe.publish.targets, name, one, other)


@app.command("verify")
def release_verify(
    name: StudentName,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="such as v3; left out: the latest")] = None,
) -> None:
    """Read a version at each target, and compare it with its manifest."""
    from koala import params as parameters
    from koala.publish.releases import verify

    loaded = parameters.load()
    loaded.student(name)
    verify(loaded.recipe.publish.targets, name, version)


@app.command("rollback")
def release_rollback(
    name: StudentName, version: Annotated[str, typer.Argument(metavar="VERSION", help="such as v3")]
) -> None:
    """Make a version the latest at each target; nothing is deleted."""
    from koala import params as parameters
    from koala import tracking
    from koala.console import say
    from koala.publish.releases import roll_back

    loaded = parameters.load()
    loaded.student(name)
    manifest = roll_back(loaded.recipe.publish.targets, name, version)
    if registered := tracking.set_alias(name, manifest.sha256, "champion"):
        say(f"MLflow: the champion of {name} is version {registered}")


@app.command("judge")
def release_judge(
    name: StudentName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="such as v3")],
    out: Annotated[Path, typer.Option(help="folder for verdict.json, a table and the images beside the champion's")],
) -> None:
    """Judge a version by today's rules, beside the one that stands."""
    from koala import params as parameters
    from koala.console import show
    from koala.publish.promotion import judge_version, show_verdict

    loaded = parameters.load()
    loaded.student(name)
    show(show_verdict(judge_version(loaded.publish, name, version, out)))


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
    from koala import params as parameters
    from koala.publish.promotion import approve_version
    from koala.publish.releases import approve
    from koala.runner import artifact

    loaded = parameters.load()
    loaded.student(name)
    if version:
        approve_version(name, version, because, by)
        return
    approve(loaded.publish, name, artifact("evaluation", name), because, by)
