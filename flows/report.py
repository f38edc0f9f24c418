"""What a flow run leaves for people to see: Prefect's artifacts, MLflow's headline figures, the last lines on the console."""

import json
import re
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from flows.stages import LAST_STAGE, Stage
from koala import tracking
from koala.console import show

GRID = Path("plots", "grid.png")
REPORT = Path("report.html")


def headline(metrics: Path) -> dict[str, float]:
    """Return the student's own figures from evaluation's metrics.json, and those that compare it with its teacher."""
    document = json.loads(metrics.read_text())
    # The models' figures are mappings; the comparisons stand beside them.
    figures = {**document["after"], **{name: value for name, value in document.items() if not isinstance(value, dict)}}
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


def artifact_key(student: str, what: str) -> str:
    """Return the key of a student's artifact. Prefect takes small letters, digits and dashes alone."""
    return re.sub(r"[^a-z0-9]+", "-", f"{student}-{what}".lower())


def make_artifacts(student: str, stages: list[Stage], run: tracking.StageRun) -> None:
    """Make the summary, the image grid, and links to the report, to the release and to the MLflow run.

    Their keys stay the same from run to run, so that Prefect keeps their history. The flow's MLflow run takes the headline
    figures, so that two flows compare by ticking their rows.
    """
    evaluation, release = _evaluation(student, stages), _release(student, stages)
    figures = headline(evaluation / "metrics.json")
    run.metrics(figures)
    tracking.choose_columns(run.id, figures, ["student", "machine"])
    for name in (Path("summary.md"), GRID, REPORT):
        run.artifact(evaluation / name)
    create_markdown_artifact(
        key=artifact_key(student, "summary"),
        description=f"{student} beside its teacher and beside itself before distillation",
        markdown=(evaluation / "summary.md").read_text(),
    )
    # Prefect shows an image by its address, and MLflow gives one to each file of a run.
    create_image_artifact(
        key=artifact_key(student, "grid"),
        description="The same prompts and seeds: the teacher, the student before distillation, the student after",
        image_url=tracking.artifact_address(run.id, GRID.name),
    )
    create_link_artifact(
        key=artifact_key(student, "report"),
        description="Figures with their intervals, the best and the worst prompts, images, curves",
        link=tracking.artifact_address(run.id, REPORT.name),
        link_text="Report",
    )
    create_link_artifact(
        key=artifact_key(student, "mlflow"),
        description="Parameters, metrics and images of every stage",
        link=tracking.run_page(run.id),
        link_text="MLflow run",
    )
    create_link_artifact(
        key=artifact_key(student, "release"),
        description="The release folder, on the machine that ran the flow",
        link=release.resolve().as_uri(),
        link_text=str(release),
    )


def show_report(student: str, stages: list[Stage]) -> None:
    """Show the summary as a table, and where the images and the release are."""
    evaluation = _evaluation(student, stages)
    show(f"\n{student}\n\n{(evaluation / 'summary.txt').read_text()}")
    show(f"Report:  {evaluation / REPORT}")
    show(f"Images:  {evaluation / GRID}")
    show(f"Release: {_release(student, stages)}")


def _evaluation(student: str, stages: list[Stage]) -> Path:
    return _folder(f"evaluate@{student}", stages)


def _release(student: str, stages: list[Stage]) -> Path:
    return _folder(f"{LAST_STAGE}@{student}", stages)


def _folder(name: str, stages: list[Stage]) -> Path:
    return next(stage.folder for stage in stages if stage.name == name)
