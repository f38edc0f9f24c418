"""The command `koala`. Commands import what they need when they run, so that `koala --help` answers at once."""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala.commands import bench, data, release, worker
from koala.commands.options import MODEL, MachineName, ProfileName, StudentName
from koala.disk import naming_full_disk
from koala.errors import KoalaError

if TYPE_CHECKING:
    from koala.teacher.config import LoraPart

STAGES, TOOLS = "Stages", "Tools"

app = typer.Typer(
    name="koala",
    help="Distil SDXL-class text-to-image models into small, fast students.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Libraries that look for updates, send usage data, or warn of what does not concern the user.
QUIET = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


@app.command(rich_help_panel=STAGES)
def source() -> None:
    """Make the table of URLs and captions."""
    from koala.runner import prepare

    job = prepare("source")
    from koala.data.source import source as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def download() -> None:
    """Fetch the table's images into webdataset shards."""
    from koala.runner import prepare

    job = prepare("download")
    from koala.data.download import download as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def score() -> None:
    """Score the images by models, for the filter."""
    from koala.runner import prepare

    job = prepare("score")
    from koala.data.score import score as stage

    job.run(stage)


@app.command("filter", rich_help_panel=STAGES)
def filter_() -> None:
    """Keep samples worth training on; report why others go."""
    from koala.runner import prepare

    job = prepare("filter")
    from koala.data.filter import filter as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def recaption() -> None:
    """Caption the kept images anew by a model."""
    from koala.runner import prepare

    job = prepare("recaption")
    from koala.data.recaption import recaption as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def teacher() -> None:
    """Fetch the teacher, or train the demo's."""
    from koala.runner import prepare

    job = prepare("teacher")
    from koala.teacher.teacher import teacher as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def encode() -> None:
    """Encode kept images into latents of the teacher's VAE."""
    from koala.runner import prepare

    job = prepare("encode")
    from koala.data.encode import encode as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def reference() -> None:
    """Generate the teacher's images of the prompts."""
    from koala.runner import prepare

    job = prepare("reference")
    from koala.evaluate.reference import reference as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def student(name: StudentName) -> None:
    """Build a student by its rule from the teacher's weights."""
    from koala.runner import prepare

    job = prepare("student", name)
    from koala.unet.student import student as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def distill(
    name: StudentName,
    machine_rank: Annotated[
        int, typer.Option(min=0, help="of several machines: 0 runs the stage, 1, 2, ... help it")
    ] = 0,
) -> None:
    """Distil the teacher into a student; resumes if interrupted."""
    from koala.runner import prepare

    job = prepare("distill", name)
    if machine_rank:
        job.help(machine_rank)
        return
    from koala.distill.distill import distill as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def evaluate(name: StudentName) -> None:
    """Measure a student beside its teacher."""
    from koala.runner import prepare

    job = prepare("evaluate", name)
    from koala.evaluate.evaluate import evaluate as stage

    job.run(stage)


@app.command(rich_help_panel=STAGES)
def publish(name: StudentName) -> None:
    """Release a student that passes the gate."""
    from koala.runner import prepare

    job = prepare("publish", name)
    from koala.publish.publish import publish as stage

    job.run(stage)


@app.command(rich_help_panel=TOOLS)
def generate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    prompt: str,
    seed: Annotated[int, typer.Option(help="of the first image")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="images")] = 4,
    compare: Annotated[list[str] | None, typer.Option(help="another model beside it; may be repeated")] = None,
    negative: Annotated[str | None, typer.Option(help="what the images should not show")] = None,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance scale")] = 3.5,
    height: Annotated[int | None, typer.Option(min=8, help="px; left out, the model's own")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="px; left out, the model's own")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="a LoRA for SDXL, or for the model; may be repeated"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="of a U-Net's file: the model with its other parts")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; left out: float16 on a GPU, float32 on a CPU")
    ] = None,
    out: Annotated[Path, typer.Option(help="the sheet's file")] = Path("generated.png"),
) -> None:
    """Generate images with one model, or several side by side."""
    from koala.evaluate.config import SamplingConfig
    from koala.sheet import Request, generate_sheet

    sampling = SamplingConfig(steps=steps, guidance=guidance)
    request = Request(prompt, seed, count, sampling, negative, (height, width))
    models = [_model(each) for each in (model, *(compare or []))]
    generate_sheet(models, request, out, list(map(_lora, lora or [])), base and _model(base), dtype)


@app.command(rich_help_panel=TOOLS)
def ui(
    models: Annotated[list[str], typer.Argument(help=f"one or more, side by side, each {MODEL}")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the page, on loopback")] = 7860,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps at first")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance scale at first")] = 3.5,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="a LoRA for SDXL, or for the model; may be repeated"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="of a U-Net's file: the model with its other parts")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")] = None,
) -> None:
    """Open a page that generates with several models side by side."""
    from koala.evaluate.config import SamplingConfig
    from koala.ui import serve

    sampling = SamplingConfig(steps=steps, guidance=guidance)
    serve([_model(each) for each in models], sampling, port, list(map(_lora, lora or [])), base and _model(base), dtype)


def _model(name: str) -> str:
    """Return the folder of a release where `name` is that of a student (`koala-700m`, `koala-700m@v2`), else `name`."""
    from koala import params as parameters

    student, _, version = name.partition("@")
    if Path(name).exists() or "/" in name or not parameters.FILE.is_file():
        return name
    params = parameters.load()
    if student not in params.students:
        return name
    from koala.publish.releases import folder_of

    return str(folder_of(params.publish.targets, student, version or None))


def _lora(text: str) -> "LoraPart":
    """Read `FILE` or `FILE:WEIGHT`."""
    from pydantic import ValidationError

    from koala.teacher.config import LoraPart

    file, colon, weight = text.rpartition(":")
    try:
        number = float(weight) if colon else None
    except ValueError:
        number = None
    try:
        return LoraPart(file=Path(text)) if number is None else LoraPart(file=Path(file), weight=number)
    except ValidationError as error:
        raise KoalaError(f"--lora {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


@app.command(rich_help_panel=TOOLS)
def inspect(
    model: Annotated[
        str, typer.Argument(help="a student of params.yaml, sdxl, bk-base, ssd-1b, vega, or a model folder")
    ],
    size: Annotated[int, typer.Option(min=64, help="side of the image, px")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
    plot: Annotated[Path | None, typer.Option(help="write a bar plot to this PNG file")] = None,
    training: Annotated[bool, typer.Option("--training", help="instead: the memory that distilling it takes")] = False,
    profile: ProfileName = None,
    machine: MachineName = None,
) -> None:
    """Count a U-Net's parameters and FLOPs beside SDXL's."""
    from koala import inspect as command

    if training:
        command.inspect_training(model, profile, machine, as_json)
    else:
        command.inspect(model, size, as_json, plot)


@app.command("convert-lora", rich_help_panel=TOOLS)
def convert_lora(
    lora: Annotated[
        Path, typer.Argument(metavar="FILE", help="a LoRA for SDXL, under diffusers', peft's or kohya's names")
    ],
    to: Annotated[str, typer.Option(help="a student of params.yaml, ssd-1b, vega, bk-base, or a student's folder")],
    out: Annotated[Path, typer.Option(help="the new .safetensors file")],
) -> None:
    """Rename a LoRA for a student; list what the student lacks."""
    from koala.convert import convert_lora as command

    command(lora, to, out)


@app.command(rich_help_panel=TOOLS)
def params(
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of params.yaml")] = False,
) -> None:
    """Check params.yaml, or print its JSON schema."""
    import json

    from koala import params as parameters
    from koala.console import show

    if schema:
        show(json.dumps(parameters.schema(), indent=2))
        return
    loaded = parameters.load()
    show(f"params.yaml is valid: profile {loaded.profile}, machine {loaded.machine}, {', '.join(loaded.students)}")


@app.command(rich_help_panel=TOOLS)
def status(
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="time limit of the answers")] = 20,
) -> None:
    """Show what runs, what waits, the champions and what is stale."""
    from koala.status import status as command

    command(as_json, seconds)


@app.command("serve-shapes", rich_help_panel=TOOLS)
def serve_shapes(
    port: Annotated[int, typer.Option(help="on 127.0.0.1")] = 8765,
    seed: Annotated[int, typer.Option(help="of the images, as in source.seed")] = 0,
) -> None:
    """Serve the demo's images on loopback, faults included."""
    from koala.demo.server import serve

    serve(port=port, seed=seed)


for name, group in (("release", release), ("data", data), ("worker", worker), ("bench", bench)):
    app.add_typer(group.app, name=name, rich_help_panel=TOOLS)


def main() -> None:
    """Run the command. An error that the user can fix is one line on stderr and exit status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Imports make two million objects that stay. To look through them again and again took a seventh of a stage's start.
    gc.set_threshold(50_000, 20, 20)
    # An exit, not a sudden end: what is open (a run of MLflow) is closed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with naming_full_disk(Path()):
            app()
    except KoalaError as error:
        sys.exit(_complain(str(error)))


def _complain(line: str) -> int:
    line = "".join(character if character.isprintable() else " " for character in line)  # names of files are untrusted
    sys.stderr.write(f"koala: {' '.join(line.split())}\n")
    return 2
