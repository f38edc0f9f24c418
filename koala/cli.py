"""The command `koala`. Commands import what they need when they run, so that `koala --help` answers at once."""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from koala.errors import DISK_FULL, KoalaError

app = typer.Typer(
    name="koala",
    help="Distil SDXL-class text-to-image models into small, fast students.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Libraries that look for updates, send usage data, or warn of what does not concern the user.
QUIET = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}

StudentName = Annotated[str, typer.Argument(metavar="STUDENT", help="a student of params.yaml, such as koala-700m")]


def _run_stage(stage: str, module: str, student: str | None = None) -> None:
    from koala import config, requirements, tracking

    params = config.load()
    requirements.check(params.profile, params.requires, stage)
    if student is not None:
        params.student(student)
    code = importlib.import_module(module)
    arguments = [student] if student else []
    # A stage whose work may be cut for hours says where it is kept, so that it goes on in the same run of MLflow.
    work = code.work_folder(params, *arguments) if hasattr(code, "work_folder") else None
    with tracking.stage_run(params, stage, student, work) as run:
        code.run(params, run, *arguments)


@app.command()
def source() -> None:
    """Make the URL table."""
    _run_stage("source", "koala.data.source")


@app.command()
def download() -> None:
    """Fetch the table's images into webdataset shards."""
    _run_stage("download", "koala.data.download")


@app.command("filter")
def filter_() -> None:
    """Keep the samples that are worth training on; say why the others went."""
    _run_stage("filter", "koala.data.filter")


@app.command()
def teacher() -> None:
    """Get the teacher: from the Hub, or trained here."""
    _run_stage("teacher", "koala.teacher")


@app.command()
def encode() -> None:
    """Turn kept images into latents of the teacher's VAE."""
    _run_stage("encode", "koala.data.encode")


@app.command()
def student(name: StudentName) -> None:
    """Build a student by its rule, with weights from the teacher."""
    _run_stage("student", "koala.unet.build", name)


@app.command()
def distill(
    name: StudentName,
    machine_rank: Annotated[
        int, typer.Option(min=0, help="of several machines: 0 for the one that runs the stage, 1, 2, ... for helpers")
    ] = 0,
) -> None:
    """Distil the teacher into a student; goes on where it was stopped."""
    if machine_rank == 0:
        _run_stage("distill", "koala.distill.launch", name)
        return
    from koala import config, requirements
    from koala.distill.launch import join

    params = config.load()
    requirements.check(params.profile, params.requires, "distill")
    params.student(name)
    join(params, name, machine_rank)


@app.command()
def evaluate(name: StudentName) -> None:
    """Measure a student beside its teacher and beside itself before distillation."""
    _run_stage("evaluate", "koala.evaluate.stage", name)


@app.command()
def publish(name: StudentName) -> None:
    """Release a student that passes the gate."""
    _run_stage("publish", "koala.publish.stage", name)


@app.command("serve-shapes")
def serve_shapes(
    port: Annotated[int, typer.Option(help="on 127.0.0.1")] = 8765,
    seed: Annotated[int, typer.Option(help="of the pictures, as in source.seed")] = 0,
) -> None:
    """Serve the demo's pictures on loopback, with the faults of the real web."""
    from koala.demo.server import serve

    serve(port=port, seed=seed)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a model folder, a .safetensors file, or owner/name of the Hub")],
    prompt: str,
    seed: Annotated[int, typer.Option(help="of the first picture")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="pictures")] = 4,
    compare: Annotated[list[str] | None, typer.Option(help="another model to draw beside it; may be repeated")] = None,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance scale")] = 3.5,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    out: Annotated[Path, typer.Option(help="the grid's file")] = Path("generated.png"),
) -> None:
    """Draw a prompt with a model, or with several side by side, as a grid."""
    from koala import generate as command

    command.generate([model, *(compare or [])], prompt, seed, count, steps, guidance, dtype, out)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="a student of params.yaml, sdxl, bk-base, ssd-1b, vega, or a model folder")
    ],
    size: Annotated[int, typer.Option(min=64, help="side of the picture, px")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON alone")] = False,
    plot: Annotated[Path | None, typer.Option(help="write a bar plot to this PNG file")] = None,
    training: Annotated[bool, typer.Option("--training", help="instead: the memory that distilling it takes")] = False,
    profile: Annotated[
        str | None, typer.Option(help="whose settings --training takes; left out: params.yaml's")
    ] = None,
) -> None:
    """Parameters, FLOPs and attention layers of each stage of a U-Net beside SDXL's; nothing is downloaded."""
    if training:
        from koala.distill import memory

        memory.show(model, profile, as_json)
        return
    from koala.unet.inspect import show

    show(model, size, as_json, plot)


Out = Annotated[Path | None, typer.Option(help="write the raw figures to this JSON file")]
Plot = Annotated[Path | None, typer.Option(help="write a plot to this PNG file")]

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine, on random weights.")
app.add_typer(bench, name="bench")


@bench.command("train")
def bench_train(
    name: StudentName = "koala-700m",
    profile: Annotated[
        str | None, typer.Option(help="whose recipe; left out: sdxl on a CUDA GPU, demo on a CPU")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps that are timed, after two that are not")] = 6,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="how often each recipe is measured; left out: 1 on a GPU, 3 on a CPU")
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="also ours with one setting turned at a time")] = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Distillation's speed, memory and where the time goes: ours beside the plain recipe."""
    from koala.bench.train import bench

    bench(name, profile, steps, rounds, ablate, out, plot)


@bench.command("infer")
def bench_infer(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[U-NET]...", help="students, or sdxl, ssd-1b, vega; none: all five")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="side of the picture, px; left out: 1024 on a GPU, 256 on a CPU")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="of a generation")] = 25,
    dtype: Annotated[str | None, typer.Option(help="left out: float16 on a GPU, float32 on a CPU; or bfloat16")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="compile the transformer layers")] = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Latency and memory of drawing: SDXL's U-Net beside its students'."""
    from koala.bench.infer import bench

    bench(models or [], size, steps, dtype, compiled, out, plot)


def main() -> None:
    """Entry point: an error that the user can mend is one line on stderr and exit status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # An exit, not a sudden end: what is open (a run of MLflow) is closed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except KoalaError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sys.exit(
            _complain(f"the disk is full{where}: free some space and run the same command again; finished work is kept")
        )


def _complain(line: str) -> int:
    print(f"koala: {' '.join(line.split())}", file=sys.stderr)
    return 2
