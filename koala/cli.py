"""The command `koala`. Commands import what they need when they run, so that `koala --help` answers at once."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

MODEL = "a release (koala-700m, koala-700m@v2), a model folder, a .safetensors file, or owner/name of the Hub"
StudentName = Annotated[str, typer.Argument(metavar="STUDENT", help="a student of params.yaml, such as koala-700m")]
ProfileName = Annotated[str | None, typer.Option("--profile", help="in place of params.yaml's")]
MachineName = Annotated[str | None, typer.Option("--machine", help="in place of params.yaml's")]


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


Out = Annotated[Path | None, typer.Option(help="write the raw figures to this JSON file")]
Plot = Annotated[Path | None, typer.Option(help="write a plot to this PNG file")]

release = typer.Typer(no_args_is_help=True, help="See, verify, approve and roll back releases.")
app.add_typer(release, name="release", rich_help_panel=TOOLS)


@release.command("list")
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


@release.command("show")
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


@release.command("diff")
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


@release.command("verify")
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


@release.command("rollback")
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


@release.command("judge")
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


@release.command("approve")
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


data = typer.Typer(no_args_is_help=True, help="See and pin the list of images, and follow a sample.")
app.add_typer(data, name="data", rich_help_panel=TOOLS)


@data.command("sample")
def data_sample(
    count: Annotated[int, typer.Argument(metavar="N", min=1, help="rows")] = 16,
    pictures: Annotated[bool, typer.Option(help="fetch their pictures too")] = True,
    out: Annotated[Path, typer.Option(help="the sheet of pictures")] = Path("sample.png"),
    profile: ProfileName = None,
) -> None:
    """Show the first usable rows of the source, and their pictures."""
    from koala import params as parameters
    from koala.data.config import DownloadConfig
    from koala.data.sample import sample

    loaded = parameters.load(profile=profile)
    download = loaded.config("download")
    assert isinstance(download, DownloadConfig)
    sample(loaded.source, download, count, out if pictures else None)


@data.command("update")
def data_update(profile: ProfileName = None) -> None:
    """Pin the source's content as it is now; say what changed."""
    from koala import params as parameters
    from koala.data.tables import TableSource
    from koala.data.update import update
    from koala.runner import artifact

    loaded = parameters.load(profile=profile)
    if not isinstance(loaded.source, TableSource):
        raise KoalaError(f"the source of profile {loaded.profile} is made by the project: it needs no pin")
    update(loaded.profile, loaded.source, artifact("table", profile=loaded.profile))


@data.command("forget")
def data_forget(
    because: Annotated[str, typer.Option(help="why it is taken down")],
    url: Annotated[str | None, typer.Option(help="the image's URL, as the table has it")] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="of the stored image, or of the fetched file")
    ] = None,
    dhash: Annotated[
        str | None, typer.Option(metavar="HEX", help="perceptual hash: what looks like it goes too")
    ] = None,
) -> None:
    """Take an image down: the next filter leaves it and its duplicates out."""
    from koala.console import show
    from koala.data import forget
    from koala.runner import artifact

    folders = [artifact(noun) for noun in ("images", "kept", "latents")]
    entry = forget.add(because, url=url, sha256=sha256, dhash=dhash)
    from koala.data.whereabouts import whereabouts

    for noun, keys in whereabouts(entry, *folders).items():
        names = ", ".join(sorted(keys)[:10]) + (", ..." if len(keys) > 10 else "")
        show(f"{noun}: {len(keys)}{' (' + names + ')' if keys else ''}")
    show(
        f"added to {forget.FILE}: `dvc repro` leaves it out of all that follows the filter; the images stay as they are fetched"
    )


@data.command("explain")
def data_explain(
    sample: Annotated[str, typer.Argument(metavar="KEY|URL", help="a sample's key, or its image's URL")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Show a sample's way: table, download, verdict, latents."""
    from koala.data.explain import explain, show_way
    from koala.runner import artifact

    folders = {noun: artifact(noun) for noun in ("table", "images", "kept", "latents")}
    show_way(explain(sample, **folders), as_json)


bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory on random weights.")
app.add_typer(bench, name="bench", rich_help_panel=TOOLS)


@bench.command("train")
def bench_train(
    name: StudentName = "koala-700m",
    profile: Annotated[
        str | None, typer.Option(help="whose recipe; left out: sdxl on a CUDA GPU, demo on a CPU")
    ] = None,
    machine: MachineName = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="images of a step; left out: the recipe's. Fewer take fewer minutes")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps that are timed, after four that are not")] = 6,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="measurements of each recipe; left out: 1 on a GPU, 3 on a CPU")
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="also ours with one setting turned at a time")] = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Measure distillation: ours beside the plain recipe."""
    from koala.bench.train import bench

    bench(name, profile, machine, batch_size, steps, rounds, ablate, out, plot)


@bench.command("infer")
def bench_infer(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="U-NET", help="students, or sdxl, ssd-1b, vega; none: all five")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="side of the image, px; left out: 1024 on a GPU, 256 on a CPU")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="of a generation")] = 25,
    dtype: Annotated[str | None, typer.Option(help="left out: float16 on a GPU, float32 on a CPU; or bfloat16")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="compile the transformer layers")] = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Measure generation: SDXL's U-Net beside its students'."""
    from koala.bench.infer import bench

    bench(models or [], size, steps, dtype, compiled, out, plot)


@bench.command("data")
def bench_data(
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="rows of a list; may be repeated; left out: 10 k, 100 k, 1 M")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="parquet, csv or jsonl; may be repeated; left out: all")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each")] = 3,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Measure the stage source: rows/s and memory over a list's length."""
    from koala.bench.data import bench

    bench(rows or [], formats or [], rounds, out, plot)


@bench.command("stages")
def bench_stages(
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="images; may be repeated; left out: 10 k, 100 k")
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="download, judge, decide, write or encode; may be repeated; left out: all"),
    ] = None,
    out: Out = None,
) -> None:
    """Measure download, filter and encode: rows/s and memory over the number of images."""
    from koala.bench.stages import bench

    bench(rows or [], passes or [], out)


@bench.command("duplicates")
def bench_duplicates(
    pictures: Annotated[
        list[int] | None, typer.Option(min=200, help="pictures; may be repeated; left out: 10 k, 100 k")
    ] = None,
    memory_gb: Annotated[float, typer.Option(min=0.25, help="limit of DuckDB's memory")] = 1.0,
) -> None:
    """Measure the filter's search for near duplicates over the number of pictures."""
    from koala.bench.duplicates import bench

    bench(pictures or [], memory_gb)


@bench.command("read")
def bench_read(
    samples: Annotated[int, typer.Option(min=64, help="encoded samples of 128 KiB")] = 2000,
    workers: Annotated[int, typer.Option(min=1, help="of each reader")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each reader")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="captions whose memory is measured")] = 1_000_000,
    images: Annotated[int, typer.Option(min=2, help="images that are decoded for a VAE that costs nothing")] = 200,
    out: Out = None,
) -> None:
    """Measure reading beside webdataset and datasets, and decoding."""
    from koala.bench.read import bench

    bench(samples, workers, rounds, rows, images, out)


def main() -> None:
    """Run the command. An error that the user can fix is one line on stderr and exit status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
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
