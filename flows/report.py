"""What a flow run leaves for people to see: Prefect's artifacts, and the last lines on the console."""

from pathlib import Path

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from flows.stages import Stage
from koala import tracking


def make_artifacts(student: str, stages: list[Stage], run: tracking.StageRun) -> None:
    """The summary, the picture grid, where the release and the MLflow run are. Their keys stay the same from run to run."""
    evaluation, release = _evaluation(student, stages), _release(student, stages)
    for name in ("summary.md", "grid.png"):
        run.artifact(evaluation / name)
    create_markdown_artifact(
        key=f"{student}-summary",
        description=f"{student} beside its teacher and beside itself before distillation",
        markdown=(evaluation / "summary.md").read_text(),
    )
    # Prefect shows a picture by its address, and MLflow gives one to each file of a run.
    create_image_artifact(
        key=f"{student}-grid",
        description="The same prompts and seeds: the teacher, the student before distillation, the student after",
        image_url=tracking.artifact_address(run.id, "grid.png"),
    )
    create_link_artifact(
        key=f"{student}-mlflow",
        description="Parameters, metrics and pictures of every stage",
        link=tracking.run_page(run.id),
        link_text="MLflow run",
    )
    create_link_artifact(
        key=f"{student}-release",
        description="The release folder, on the machine that ran the flow",
        link=release.resolve().as_uri(),
        link_text=str(release),
    )


def print_report(student: str, stages: list[Stage]) -> None:
    """The summary as a table, and where the pictures and the release are."""
    evaluation = _evaluation(student, stages)
    print(f"\n{student}\n\n{(evaluation / 'summary.txt').read_text()}")
    print(f"Pictures: {evaluation / 'grid.png'}")
    print(f"Release:  {_release(student, stages)}")


def _evaluation(student: str, stages: list[Stage]) -> Path:
    return _out(f"evaluate@{student}", stages)


def _release(student: str, stages: list[Stage]) -> Path:
    return _out(f"publish@{student}", stages) / "release"


def _out(name: str, stages: list[Stage]) -> Path:
    return next(stage.outs[0] for stage in stages if stage.name == name)
