"""Tables of a benchmark as Markdown, plots, and the raw figures as JSON."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.bench.runner import Figures
from koala.console import show
from koala.errors import KoalaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30


def document(bench: str, settings: dict[str, Any], rows: Sequence[Figures]) -> dict[str, Any]:
    """Return all that was measured, with date, device and versions. Raises KoalaError where no row could be measured."""
    where = next((row["where"] for row in rows if "where" in row), None)
    if where is None:
        raise KoalaError(f"bench {bench}: nothing could be measured: choose another profile or a smaller size")
    bare = [{name: value for name, value in row.items() if name != "where"} for row in rows]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"bench": bench, "date": date, "where": where, "settings": settings, "rows": bare}


def train(found: dict[str, Any], out: Path | None, plot: Path | None) -> None:
    """Show `koala bench train`'s tables: speed and memory beside the first row, then where an image's time went."""
    rows = found["rows"]
    first = next(row for row in rows if "images_per_second" in row)
    settings = found["settings"]
    peak = settings["matmul_flops_per_second"]
    speed = [["recipe", "micro-batch", "images/s", f"of {first['name']}'s", "TFLOP/s", "of matmul peak", "memory, GiB"]]
    parts = list(dict.fromkeys(part for row in rows for part in row.get("seconds_per_image", ())))
    spent = [["ms an image", *parts, "total"]]
    for row in rows:
        if "images_per_second" not in row:
            speed.append([row["name"], _why(row), *["-"] * 5])
            continue
        speed.append(
            [
                row["name"],
                str(row["micro_batch"]),
                _with_range(row["images_per_second"], row["images_per_second_of_rounds"]),
                f"{row['images_per_second'] / first['images_per_second']:.2f} x",
                f"{row['images_per_second'] * row['flops_per_image'] / 1e12:.3g}",
                f"{row['images_per_second'] * row['flops_per_image'] / peak:.1%}",
                _gib(row["peak_bytes"]),
            ]
        )
        each = row["seconds_per_image"]
        total = 1 / row["images_per_second"]
        spent.append([row["name"], *(f"{1000 * each.get(part, 0):.2f}" for part in parts), f"{1000 * total:.2f}"])
    flops = first["flops_per_image"] / 1e12
    sizes = " and ".join(f"{height}x{width}" for height, width in first["buckets"])
    show(f"Distilling {settings['student']} at profile {settings['profile']}, {sizes} px: {flops:.4g} TFLOP an image")
    _print(found, [speed, spent])
    show(f"matmul peak: {peak / 1e12:.4g} TFLOP/s, precision {first['precision']}; rounds: {settings['rounds']}")
    _save(found, out)
    _save_plot(found, plot, _train_figure)


def infer(found: dict[str, Any], out: Path | None, plot: Path | None) -> None:
    """Show `koala bench infer`'s table: latency, memory, and what fits, beside the first row."""
    rows, settings = found["rows"], found["settings"]
    first = rows[0]
    limits = [f"{limit} GiB" for limit in settings["limits_gib"]]
    table = [
        ["U-Net", "M parameters", "ms a step", "speed", f"s for {settings['steps']} steps", "speed", "memory, GiB"]
    ]
    table[0] += [f"fits {limit}" for limit in limits]
    for row in rows:
        fits = [row["fits"][str(limit)] for limit in settings["limits_gib"]]
        parameters = f"{row['parameters'] / 1e6:.1f}"
        if "step_seconds" not in row:
            table.append([row["name"], parameters, _why(row), *["-"] * 4, *fits])
            continue
        table.append(
            [
                row["name"],
                parameters,
                f"{1000 * row['step_seconds']:.1f}",
                _ratio(first, row, "step_seconds"),
                f"{row['generation_seconds']:.2f}",
                _ratio(first, row, "generation_seconds"),
                _gib(row["peak_bytes"]),
                *fits,
            ]
        )
    how = ", layers compiled" if settings["compile"] else ""
    show(f"One image of {settings['size']} px, guidance (two forward passes a step), {settings['dtype']}{how}")
    _print(found, [table])
    _save(found, out)
    _save_plot(found, plot, _infer_figure)


def read(found: dict[str, Any], out: Path | None) -> None:
    """Show `koala bench read`'s tables: readers beside ours, decoding by workers, and the memory of captions."""
    rows, settings, memory = found["rows"], found["settings"], found["settings"]["memory"]
    table = [["reader", "samples/s", f"of {rows[0]['name']}'s"]]
    for row in rows:
        share = _share(row, rows[0], "samples_per_second") if not row["name"].startswith("decode") else "-"
        table.append(
            [row["name"], f"{row['samples_per_second']:.0f}" if "samples_per_second" in row else _why(row), share]
        )
    show(
        f"Reading {settings['samples']} latents of 128 KiB, {settings['workers']} workers, median of {settings['rounds']}"
    )
    _print(found, [table])
    if "private_bytes" in memory:
        sizes = ", ".join(f"{_gib(memory[f'{kind}_bytes'])} GiB {kind}" for kind in ("private", "shared"))
        show(f"{settings['rows']} captions of 500 characters, with the order of an epoch: {sizes}")
    _save(found, out)


def _share(row: Figures, first: Figures, name: str) -> str:
    return f"{row[name] / first[name]:.2f} x" if name in row and name in first else "-"


def _why(row: Figures) -> str:
    """Return what stands in place of figures."""
    return "out of memory" if row.get("out_of_memory") else f"failed, status {row['failed']}"


def data(found: dict[str, Any], out: Path | None, plot: Path | None) -> None:
    """Show `koala bench data`'s table: how speed and memory go with a list's length."""
    table = [["pass", "rows", "rows/s", "rows a CPU second", "memory, MiB"]]
    for row in found["rows"]:
        if "seconds" not in row:
            table.append([row["name"], f"{row['rows']:,}", _why(row), "-", "-"])
            continue
        speeds = [row["rows"] / seconds for seconds in row["seconds_of_rounds"] if seconds]
        spread = f" ({min(speeds):,.0f} to {max(speeds):,.0f})" if len(speeds) > 1 else ""
        table.append(
            [
                row["name"],
                f"{row['rows']:,}",
                f"{row['rows'] / row['seconds']:,.0f}{spread}",
                f"{row['rows'] / row['cpu_seconds']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
            ]
        )
    _print(found, [table])
    _save(found, out)
    _save_plot(found, plot, _data_figure)


def _with_range(value: float, rounds: Sequence[float | None]) -> str:
    """Return a figure and, of several rounds, the range."""
    known = [each for each in rounds if each is not None]
    return f"{value:.2f}" + (f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else "")


def _ratio(first: Figures, row: Figures, name: str) -> str:
    return f"{first[name] / row[name]:.2f} x" if name in first else "-"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _print(found: dict[str, Any], tables: Sequence[Sequence[Sequence[str]]]) -> None:
    for rows in tables:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        show("")
        for first, *others in (rows[0], rule, *rows[1:]):
            cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
            show(f"| {' | '.join(cells)} |")
    where = ", ".join(f"{name} {value}" for name, value in found["where"].items() if name != "device")
    show(f"\n{found['where']['device']}; {where}; {found['date']}")


def _save(found: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def _save_plot(found: dict[str, Any], plot: Path | None, draw: Callable[[dict[str, Any]], "Figure"]) -> None:
    if plot:
        plot.parent.mkdir(parents=True, exist_ok=True)
        try:
            draw(found).savefig(plot, dpi=130)
        except ValueError:
            raise KoalaError(f"--plot {plot}: name a .png, .svg or .pdf file") from None


def _train_figure(found: dict[str, Any]) -> "Figure":
    """Plot a bar for each recipe: where an image's time went."""
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if "seconds_per_image" in row]
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    left = [0.0] * len(rows)
    for part in dict.fromkeys(part for row in rows for part in row["seconds_per_image"]):
        widths = [1000 * row["seconds_per_image"].get(part, 0) for row in rows]
        axes.barh(names, widths, left=left, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    settings = found["settings"]
    axes.set(xlabel="ms an image", title=f"Distilling {settings['student']}, profile {settings['profile']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


def _infer_figure(found: dict[str, Any]) -> "Figure":
    """Plot two panels: seconds for an image, and memory."""
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if "step_seconds" in row]
    figure = Figure(figsize=(10, 1 + 0.45 * len(rows)), layout="constrained")
    names, settings = [row["name"] for row in rows], found["settings"]
    panels = {
        f"s for {settings['steps']} steps at {settings['size']} px": [row["generation_seconds"] for row in rows],
        "memory at its peak, GiB": [(row["peak_bytes"] or 0) / GIB for row in rows],
    }
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        bars = axes.barh(names, values, height=0.6, color="#2a6f97")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.margins(x=0.15)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    return figure


def _data_figure(found: dict[str, Any]) -> "Figure":
    """Plot two panels over the number of rows: rows/s, and memory."""
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if "seconds" in row]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = {
        "thousand rows a CPU second": lambda row: row["rows"] / row["cpu_seconds"] / 1_000,
        "memory at its peak, MiB": lambda row: row["peak_bytes"] / 2**20,
    }
    for axes, (title, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [row for row in rows if row["name"] == name]
            axes.plot([row["rows"] for row in own], list(map(value, own)), marker="o", label=name)
        axes.set(xscale="log", xlabel="rows")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    rates, memory = figure.axes
    rates.set_yscale("log")  # a table is read a hundred times as fast as an image is judged
    memory.set_ylim(0)
    memory.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
