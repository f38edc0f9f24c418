"""Progress of long-running work (a bar in a terminal, a periodic line in a log, both with an ETA), and output."""

import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

LOG_EVERY_SECONDS = 10.0
_BAR_WIDTH = 24
_ANY_WIDTH = 2**30
_DIRECTIONS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def progress(
    items: Iterable[T],
    label: str,
    total: int | None = None,
    done: int = 0,
    unit: str | None = None,
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yield `items` and show how many are done.

    `done` of `total` were finished by an earlier, interrupted run: they count in the share, not in the ETA. `unit` names an
    item, such as `images`, and shows how many of them a second takes. An item may stand for `size` of them.
    Everything goes to stderr, so that stdout holds only what the command gives.
    """
    if total is None:
        total = done + len(items)  # type: ignore[arg-type]
    show = _bar if sys.stderr.isatty() else _lines
    yield from show(items, label, total, done, unit, size)


def _bar(
    items: Iterable[T], label: str, total: int, done: int, unit: str | None, size: Callable[[T], int]
) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *([TextColumn(f"{{task.speed:.1f}} {unit}/s")] if unit else []),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task, size(item))


def _lines(
    items: Iterable[T], label: str, total: int, done: int, unit: str | None, size: Callable[[T], int]
) -> Iterator[T]:
    start = last = time.monotonic()
    count = shown = 0
    for item in items:
        yield item
        count += size(item)
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS or done + count == total:
            # By the pace since the last line: a first item may compile for a minute, or load what all others use.
            left = (now - last) / (count - shown) * (total - done - count)
            last, shown = now, count
            filled = round(_BAR_WIDTH * (done + count) / total)
            bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
            rate = f", {count / max(now - start, 1e-9):.1f} {unit}/s" if unit else ""
            say(f"{label} [{bar}] {done + count}/{total}{rate}, {_minutes(left)} left")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(line: str) -> None:
    """Write one line of news to stderr and flush it."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def show(text: str) -> None:
    """Write what a command gives to stdout, with a newline, and flush it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> None:
    """Write a table to stdout; in a terminal that is too narrow for it, a line for each cell. Cells are shown literally.

    No cell is folded or cut, so that each can be copied.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(Text(column))
    lines = [tuple(map(Text, row)) for row in rows]
    for line in lines:
        table.add_row(*line)
    console = Console(highlight=False)
    width = console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum
    if width <= console.width or not console.is_terminal:
        console.width = width
        console.print(table)
    else:
        widest = max(map(len, columns))
        for line in lines:
            console.print()
            for column, cell in zip(columns, line, strict=True):
                console.print(Text(f"{column:{widest}}  ").append_text(cell), soft_wrap=True)
        console.print()
    console.print(Text(caption), soft_wrap=True)


def harmless(text: str) -> str:
    """Return text from outside in one line, without what a terminal would obey and what turns the direction of writing."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _commands(character) else character for character in " ".join(text.split())
    )


def _commands(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


def hide_loading_bars() -> None:
    """Turn off the bars of diffusers and transformers: reading a model takes moments and would bury our own progress."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column to the left, the others to the right, a line under the headings."""
    lines = [columns, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in [columns, ["-" * width for width in widths], *rows]
    )
