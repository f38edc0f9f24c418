"""The stage `publish`: a student that passes the gate becomes a release."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koala.console import say
from koala.errors import KoalaError
from koala.evaluate.values import FILE as VALUES
from koala.evaluate.values import SAMPLES
from koala.publish import approvals, card, gate_page
from koala.publish.champion import champion, verdicts_on
from koala.publish.config import PublishConfig
from koala.publish.gate import Verdict
from koala.publish.portable import make_portable, store_as
from koala.publish.targets.base import Target
from koala.publish.versions import GATE, RECEIPT, TRAINING, Manifest
from koala.publish.workflow import workflow
from koala.run import STATE, Run
from koala.teacher.layout import LICENSE
from koala.teacher.shape import read_json

_REGISTERED = ("README.md", "metrics.json", "report.html", GATE, TRAINING)  # the weights are registered by reference


def publish(config: PublishConfig, distilled: Path, evaluation: Path, out: Path, run: Run) -> None:
    """Make the release in `out`, and send it to the targets.

    `out` holds the pipeline's folders with weights in `config.dtype`, README.md (the card), LICENSE.md (the teacher's, where it
    has one), metrics.json, report.html, grid.png, what a later student is compared with (values.parquet, samples/),
    training.json (provenance of the training, where `distilled` has one), gate.json (verdicts and approval) and receipt.json
    (all verdicts, who approved it otherwise, and what the targets answered). Unless `single_file` is off, it also holds
    NAME.safetensors, NAME-unet.safetensors and, where ComfyUI recognises the student, NAME-comfyui.json.

    Args:
        config: The gate, the card and the targets.
        distilled: The student's pipeline; the release is called as this folder.
        evaluation: Its evaluation.
        out: Where the release goes; what an interrupted call left there is replaced.
        run: Receives the gate's page, the card and the receipt; of a student that is refused, the page and a receipt. The
            release is registered as `challenger` and, with `promote: automatic`, as `champion` once all targets have it.

    Raises:
        KoalaError: The student does not meet a rule, and nobody approved it: nothing is released. Or a target failed: the
            others have the release, and the next call completes it.
    """
    name = distilled.name
    metrics = json.loads((evaluation / "metrics.json").read_text())
    derived = {metric: value for metric, value in metrics.items() if isinstance(value, float)}
    standing = champion(config, name)
    verdicts = verdicts_on(evaluation, config, standing)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    approval = approvals.find(config.approvals, name, evaluation) if failed else None
    training = _training(distilled)
    receipt: dict[str, Any] = {
        "student": name,
        "released": not failed or approval is not None,
        "run_id": training.get("run_id"),
        "commit": training.get("commit"),
        "rules": [verdict.report() for verdict in verdicts],
        "approval": approval.model_dump(mode="json") if approval else None,
        "promote": config.promote,
        "targets": [],
    }
    _log(run, verdicts)
    images = standing.beside(evaluation, name) if standing else None
    if images:
        run.image(images, "champion", 0)
    with tempfile.TemporaryDirectory() as folder:  # not in the release, which is the same whatever it is compared with
        gate_page.write(Path(folder, gate_page.FILE), name, verdicts, evaluation, standing, images)
        run.artifact(Path(folder, gate_page.FILE))
    if failed and not approval:
        _log_refusal(run, receipt)
        missed = "; ".join(map(str, failed))
        raise KoalaError(f"{name} is not released (publish.require): {missed}: train it longer, or change the rule")
    if approval:
        run.tags({"approved_by": approval.by, "approved_because": approval.because})

    _copy(distilled, evaluation, out)
    make_portable(out)
    store_as(out, config.dtype)
    if not (out / LICENSE).exists():
        (out / LICENSE).write_text(card.license_text(name, config))
    files = _single_files(config, out, name) if config.single_file else card.NO_FILES
    table = (evaluation / "summary.md").read_text()
    (out / "README.md").write_text(card.render(name, metrics, derived, training, table, config, files))
    lasting = [verdict for verdict in verdicts if verdict.rule.of != "champion"]
    overruled = any(not verdict.passed for verdict in lasting)
    _write(
        out / GATE,
        {
            "rules": [verdict.report() for verdict in lasting],
            "approval": receipt["approval"] if overruled else None,
        },
    )

    content, cards = Manifest.of(out).sha256, [out / each for each in _REGISTERED if (out / each).is_file()]
    run.register(name, content, cards, _origin(training), "challenger")
    stands = config.promote == "automatic"
    failures = _send(config.targets, out, name, receipt, stands)
    run.artifact(out / RECEIPT)
    run.artifact(out / "README.md")
    if failures:
        raise KoalaError(f"{name}: {'; '.join(failures)}: publish again, what other targets have is not sent twice")
    run.register(name, content, cards, _links(receipt), "champion" if stands else "challenger")
    run.tags({"released": "yes"})
    version = next((answer["version"] for answer in receipt["targets"] if "version" in answer), None)
    say(f"publish: {name} is released" if stands else _candidate(name, version))
    if version:
        # The form that gto and `dvc artifacts` read.
        tag = f"git tag -a {name}@{version}.0.0 -m 'Release {name} {version}'"
        say(f"publish: to name it in git, once dvc.lock is committed: {tag}")


def _candidate(name: str, version: str | None) -> str:
    return (
        f"publish: {name} {version or ''} is at the targets as a candidate, and what stands there stays (publish.promote: ask): "
        "promote it by `prefect deployment run promote/version` (docs/team.md), or without a server by "
        f"`koala release rollback {name} {version or 'VERSION'}`"
    )


def _send(targets: Sequence[Target], out: Path, name: str, receipt: dict[str, Any], stands: bool) -> list[str]:
    """Send the release to every target, also where one before it failed; note in the receipt what each answered.

    Returns what failed, in words.
    """
    failures = []
    _write(out / RECEIPT, receipt)
    for target in targets:
        try:
            receipt["targets"].append({"kind": target.kind, **target.send(out, name, stands)})
        except (KoalaError, OSError) as error:
            receipt["targets"].append({"kind": target.kind, "failed": str(error)})
            failures.append(f"not at target {target.kind}: {error}")
        _write(out / RECEIPT, receipt)
    return failures


def _origin(training: Mapping[str, Any]) -> dict[str, str]:
    """Return tags that lead from a registered version to what it was made from."""
    links = {
        "git_commit": training.get("commit"),
        "training_run": training.get("run_id"),
        "profile": training.get("profile"),
    }
    hashes = {f"data_hash.{noun}": found for noun, found in training.get("inputs", {}).items()}
    return {name: str(value) for name, value in {**links, **hashes}.items() if value}


def _links(receipt: Mapping[str, Any]) -> dict[str, str]:
    """Return tags that lead from a registered version to its files at the targets: `hub.commit`, `s3.version`, ..."""
    return {
        f"{answer['kind']}.{name}": str(value)
        for answer in receipt["targets"]
        for name, value in answer.items()
        if name != "kind"
    }


def _log(run: Run, verdicts: Sequence[Verdict]) -> None:
    """Log the figure that each rule judged, and its verdict in words."""
    judged = {verdict.rule.figure: verdict.judged for verdict in verdicts}
    run.metrics({f"gate/{name}": value for name, value in judged.items() if value is not None})
    run.tags({f"gate/{verdict.rule}": "passed" if verdict.passed else f"failed: {verdict}" for verdict in verdicts})


def _log_refusal(run: Run, receipt: dict[str, Any]) -> None:
    """Log the receipt of a student that is refused: there is no release to hold it."""
    run.tags({"released": "no"})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RECEIPT
        _write(file, receipt)
        run.artifact(file)


def _training(distilled: Path) -> dict[str, Any]:
    """Return the provenance of the training, or nothing."""
    file = distilled / "provenance.json"
    training: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return training


def _single_files(config: PublishConfig, out: Path, name: str) -> card.SingleFiles:
    """Write the single files, and the workflow where there is a front end for it."""
    from koala.publish.single_file import image_side, recognised_as, write_checkpoint, write_unet

    checkpoint, unet = f"{name}.safetensors", f"{name}-unet.safetensors"
    write_checkpoint(out, out / checkpoint, title=name, license=config.licence, dtype=config.dtype)
    write_unet(out, out / unet, title=name, license=config.licence, dtype=config.dtype)
    recognised = recognised_as(read_json(out / "unet" / "config.json"))
    zeros = bool(read_json(out / "model_index.json").get("force_zeros_for_empty_prompt", True))
    files = card.SingleFiles(checkpoint, unet, f"{name}-comfyui.json" if recognised else None, recognised, zeros)
    say(f"publish: {checkpoint}: {files.remark}")
    if files.workflow:
        scheduler = read_json(out / "scheduler" / "scheduler_config.json")
        graph = workflow(checkpoint, card.example(config), config.sampling, image_side(out), scheduler, files.zeros)
        _write(out / files.workflow, graph)
    return files


def _copy(distilled: Path, evaluation: Path, out: Path) -> None:
    """Fill `out` with the pipeline, the metrics, the grid, and the provenance of the training, where there is one."""
    _clear(out)
    shutil.copyfile(distilled / "model_index.json", out / "model_index.json")
    if (distilled / LICENSE).is_file():
        shutil.copyfile(distilled / LICENSE, out / LICENSE)
    for component in json.loads((distilled / "model_index.json").read_text()):
        if (distilled / component).is_dir():
            # Writable, though DVC's files are read-only.
            shutil.copytree(distilled / component, out / component, copy_function=shutil.copyfile)
    for figures in ("metrics.json", "report.html", VALUES):
        shutil.copyfile(evaluation / figures, out / figures)
    shutil.copytree(evaluation / SAMPLES, out / SAMPLES, copy_function=shutil.copyfile)
    shutil.copyfile(evaluation / "plots" / "grid.png", out / "grid.png")
    if (distilled / "provenance.json").is_file():
        shutil.copyfile(distilled / "provenance.json", out / TRAINING)


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
