"""The stage `evaluate`: the student after distillation, beside its teacher and beside itself before."""

import gc
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from koala import pipeline
from koala.console import progress, say
from koala.evaluate import report
from koala.evaluate.attributes import attribute_accuracy
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.latency import step_latency
from koala.evaluate.metrics import agreement, clip_score
from koala.evaluate.prompts import Prompt, load_prompts
from koala.provenance import data_hash
from koala.tracking import flatten, hash_tags
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun

Measured = dict[str, dict[str, float]]
"""Model -> metric -> value. Models: teacher, before, after."""


def run(params: "Params", run: "StageRun", student: str) -> None:
    """Draw, measure, and put metrics.json, summary, grid and plots at `params.out("evaluate", student)`."""
    config = params.evaluate
    prompts = load_prompts(config)
    folders = {
        "teacher": params.need("teacher"),
        "before": params.need("student", student),
        "after": params.need("distill", student),
    }
    run.tags(hash_tags(**folders))
    pictures = {name: _pictures(folder, f"evaluate: {name}", prompts, config) for name, folder in folders.items()}
    measured = _quality(pictures, prompts, config)
    _cost(folders, measured, config)
    derived = _compare(measured)

    work = resume_folder("evaluate", student=student, inputs={name: data_hash(path) for name, path in folders.items()})
    (work / "metrics.json").write_text(json.dumps({**measured, **derived}, indent=2) + "\n")
    report.write(work, student, measured, pictures, prompts, config.grid_rows)
    shutil.copyfile(folders["after"] / "provenance.json", work / "provenance.json")
    # The student's own figures by their bare names, so that two students compare by the same ones.
    run.metrics({**measured["after"], **derived, **flatten({name: measured[name] for name in ("teacher", "before")})})
    run.artifact(work)
    run.image(Image.open(work / "grid.png"), "grid", 0)

    out = params.out("evaluate", student)
    finish(work, out)
    say((out / "summary.txt").read_text())


def _pictures(folder: Path, label: str, prompts: list[Prompt], config: EvaluateConfig) -> list[Image.Image]:
    """A model's pictures of the prompts: kept in a folder of the model's hash, so that none is drawn twice."""
    settings = {name: getattr(config, name) for name in ("steps", "guidance", "dtype")}
    kept = resume_folder("pictures", model=data_hash(folder), prompts=[vars(prompt) for prompt in prompts], **settings)
    files = [kept / f"{number:06d}.png" for number in range(len(prompts))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if missing:
        loaded = pipeline.load(folder, config.dtype)
        batches = [missing[first : first + config.batch_size] for first in range(0, len(missing), config.batch_size)]
        for batch in progress(batches, label):
            seeded = [(prompts[number].text, prompts[number].seed) for number in batch]
            for number, image in zip(batch, pipeline.draw(loaded, seeded, config.steps, config.guidance), strict=True):
                partial = files[number].with_suffix(".partial")
                image.save(partial, format="PNG")
                partial.rename(files[number])
    return [Image.open(file).convert("RGB") for file in files]


def _quality(pictures: dict[str, list[Image.Image]], prompts: list[Prompt], config: EvaluateConfig) -> Measured:
    measured: Measured = {name: {} for name in pictures}
    if "clip" in config.metrics:
        from koala.evaluate.clip import Clip

        clip = Clip(str(config.clip_model), str(config.clip_revision), pipeline.device())
    for name, images in pictures.items():
        if "attributes" in config.metrics:
            measured[name] |= attribute_accuracy(images, [prompt.asked for prompt in prompts if prompt.asked])
        if "clip" in config.metrics:
            texts = [prompt.text for prompt in prompts]
            measured[name]["clip_score"] = clip_score(images, texts, clip.images, clip.texts)
        if name != "teacher":
            measured[name]["agreement_db"] = agreement(images, pictures["teacher"])
    return measured


def _cost(folders: dict[str, Path], measured: Measured, config: EvaluateConfig) -> None:
    """Parameters and latency of each U-Net, measured side by side in this process."""
    pipelines = {name: pipeline.load(folder, config.dtype) for name, folder in folders.items()}
    unets = {name: loaded.unet for name, loaded in pipelines.items()}
    for name, unet in unets.items():
        measured[name]["unet_parameters"] = sum(parameter.numel() for parameter in unet.parameters())
    tokens = pipelines["teacher"].tokenizer.model_max_length
    for name, seconds in step_latency(unets, tokens, config.latency_batch, config.latency_repeats).items():
        measured[name]["step_ms"] = 1000 * seconds
    del pipelines, unets
    gc.collect()


def _compare(measured: Measured) -> dict[str, float]:
    """The student after distillation against its teacher."""
    teacher, after = measured["teacher"], measured["after"]
    derived: dict[str, Any] = {
        "size_of_teacher": after["unet_parameters"] / teacher["unet_parameters"],
        "speed_up": teacher["step_ms"] / after["step_ms"],
    }
    for metric in ("attributes/all", "clip_score"):
        if metric in teacher:
            derived[f"share_of_teacher/{metric}"] = after[metric] / teacher[metric] if teacher[metric] else 0.0
    return derived
