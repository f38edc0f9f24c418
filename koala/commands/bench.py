"""The commands `koala bench ...`."""

from typing import Annotated

import typer

from koala.commands.options import MachineName, Out, Plot, StudentName

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory on random weights.")


@app.command("train")
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


@app.command("infer")
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


@app.command("data")
def bench_data(
    rows: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated; left out: 10 k, 100 k")] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="source, download, judge, decide, write or encode; may be repeated; left out: all"),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="of source's list: parquet, csv or jsonl; may be repeated; left out: all"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each")] = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Measure what comes before training: rows/s and memory over a list's length."""
    from koala.bench.data import bench

    bench(rows or [], passes or [], formats or [], rounds, out, plot)


@app.command("duplicates")
def bench_duplicates(
    pictures: Annotated[
        list[int] | None, typer.Option(min=200, help="pictures; may be repeated; left out: 10 k, 100 k")
    ] = None,
    memory_gb: Annotated[float, typer.Option(min=0.25, help="limit of DuckDB's memory")] = 1.0,
) -> None:
    """Measure the filter's search for near duplicates over the number of pictures."""
    from koala.bench.duplicates import bench

    bench(pictures or [], memory_gb)


@app.command("read")
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
