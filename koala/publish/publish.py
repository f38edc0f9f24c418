"""The stage `publish`: a student that passes the gate becomes a release."""

import json
import shutil
from pathlib import Path
from typing import Any

from koala.console import say
from koala.errors import KoalaError
from koala.publish import card
from koala.publish.config import PublishConfig
from koala.publish.gate import shortfalls
from koala.publish.portable import make_portable
from koala.publish.workflow import workflow
from koala.run import STATE, Run
from koala.teacher.shape import read_json

TRAINING = "training.json"
RECEIPT = "receipt.json"


def publish(config: PublishConfig, distilled: Path, evaluation: Path, out: Path, run: Run) -> None:
    """Make the release in `out`, and send it to the targets.

    `out` holds the pipeline's folders, README.md (the card), metrics.json, grid.png, training.json (provenance of the
    training, where `distilled` has one) and receipt.json (what was required, and what the targets answered). Unless
    `single_file` is off, it also holds NAME.safetensors, NAME-unet.safetensors and, where ComfyUI recognises the
    student, NAME-comfyui.json.

    Args:
        config: The gate, the card and the targets.
        distilled: The student's pipeline; the release is called as this folder.
        evaluation: Its evaluation.
        out: Where the release goes; what an interrupted call left there is replaced.
        run: Receives the verdict, the card and the receipt.

    Raises:
        KoalaError: The student misses a threshold. Nothing is released.
    """
    name = distilled.name
    metrics = json.loads((evaluation / "metrics.json").read_text())
    derived = {metric: value for metric, value in metrics.items() if isinstance(value, float)}
    reached = {**metrics["after"], **derived}
    if short := shortfalls(reached, config.require):
        run.tags({"released": "no"})
        raise KoalaError(
            f"{name} is not released: {'; '.join(short)} (publish.require): train it longer, or lower the threshold"
        )

    training = _copy(distilled, evaluation, out)
    make_portable(out)
    files = _single_files(config, out, name) if config.single_file else card.NO_FILES
    table = (evaluation / "summary.md").read_text()
    (out / "README.md").write_text(card.render(name, metrics, derived, training, table, config, files))
    receipt: dict[str, Any] = {
        "student": name,
        "released": True,
        "run_id": training.get("run_id"),
        "commit": training.get("commit"),
        "required": config.require,
        "reached": {metric: reached[metric] for metric in config.require},
        "targets": [],
    }
    _write(out / RECEIPT, receipt)
    for target in config.targets:
        receipt["targets"].append({"kind": target.kind, **target.send(out, name)})
        _write(out / RECEIPT, receipt)
    run.tags({"released": "yes"})
    run.artifact(out / RECEIPT)
    run.artifact(out / "README.md")
    say(f"publish: {name} is released")


def _single_files(config: PublishConfig, out: Path, name: str) -> card.SingleFiles:
    """Write the single files, and the workflow where there is a front end for it."""
    from koala.publish.single_file import image_side, recognised_as, write_checkpoint, write_unet

    checkpoint, unet = f"{name}.safetensors", f"{name}-unet.safetensors"
    write_checkpoint(out, out / checkpoint, title=name, license=config.license)
    write_unet(out, out / unet, title=name, license=config.license)
    recognised = recognised_as(read_json(out / "unet" / "config.json"))
    files = card.SingleFiles(checkpoint, unet, f"{name}-comfyui.json" if recognised else None, recognised)
    say(f"publish: {checkpoint}: {files.remark}")
    if files.workflow:
        scheduler = read_json(out / "scheduler" / "scheduler_config.json")
        trailing = scheduler.get("timestep_spacing") == "trailing"
        prompt = card.example(config)
        _write(out / files.workflow, workflow(checkpoint, prompt, config.sampling, image_side(out), trailing))
    return files


def _copy(distilled: Path, evaluation: Path, out: Path) -> dict[str, Any]:
    """Fill `out` with the pipeline, the metrics and the grid. Return the provenance of the training, or nothing."""
    _clear(out)
    shutil.copyfile(distilled / "model_index.json", out / "model_index.json")
    for component in json.loads((distilled / "model_index.json").read_text()):
        if (distilled / component).is_dir():
            # Writable, though DVC's files are read-only.
            shutil.copytree(distilled / component, out / component, copy_function=shutil.copyfile)
    shutil.copyfile(evaluation / "metrics.json", out / "metrics.json")
    shutil.copyfile(evaluation / "plots" / "grid.png", out / "grid.png")
    if not (distilled / "provenance.json").is_file():
        return {}
    shutil.copyfile(distilled / "provenance.json", out / TRAINING)
    training: dict[str, Any] = json.loads((out / TRAINING).read_text())
    return training


def _clear(out: Path) -> None:
    """Remove what an interrupted call left in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.name == STATE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
