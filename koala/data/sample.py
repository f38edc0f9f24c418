"""`koala data sample`: some rows of a source, and their pictures, before one commits to the list."""

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from koala.console import progress, show_table
from koala.data.config import DownloadConfig, SourceConfig
from koala.data.decode import UnusableError, normalised
from koala.data.download import sidecar
from koala.data.fetch import FetchConfig, Fetcher
from koala.errors import KoalaError

_THREADS = 16
_CAPTION = 200  # characters that are shown
_BLANK = (64, 64)  # px, of a picture that did not come


def sample(config: SourceConfig, download: DownloadConfig, count: int, pictures: Path | None) -> None:
    """Show the first `count` usable rows of a source, and put their pictures into one sheet.

    Args:
        config: The source.
        download: How pictures are fetched and decoded.
        count: Rows.
        pictures: The sheet's file; None fetches none.

    Raises:
        KoalaError: The source cannot be read or holds no usable row, or the sheet cannot be written.
    """
    dropped: Counter[str] = Counter()
    tables = config.model_copy(update={"rows": _rows(config, count)}).tables(dropped)
    rows: list[dict[str, Any]] = []
    for table in tables:
        rows += table.slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    if not rows:
        raise KoalaError(f"{config.location} holds no usable row (dropped: {dict(dropped)})")
    outcomes = _look(rows, download, pictures) if pictures else None
    columns = list(rows[0]) + (["picture"] if outcomes else [])
    cells = [[_cell(name, value) for name, value in row.items()] for row in rows]
    cells = [[*row, outcome] for row, outcome in zip(cells, outcomes, strict=True)] if outcomes else cells
    caption = f"{len(rows)} rows of {config.location}"
    if dropped:
        caption += f"; before the last of them were dropped: {', '.join(f'{n} {why}' for why, n in dropped.items())}"
    if pictures:
        caption += f"; pictures: {pictures}"
    show_table(columns, cells, caption)


def _rows(config: SourceConfig, count: int) -> int:
    """Return how many rows to make: all of a list that is made at once, since each depends on their number."""
    return config.rows if config.kind == "shapes" and config.rows else count


def _look(rows: Sequence[dict[str, Any]], download: DownloadConfig, file: Path) -> list[str]:
    """Fetch the rows' pictures and write the sheet. Return what became of each."""
    from PIL import Image

    from koala.plots import contact_sheet

    machine = download.machine
    fetcher = Fetcher(FetchConfig(**machine.model_dump(include=set(FetchConfig.model_fields))), download.allow)

    def fetched(row: dict[str, Any]) -> tuple[Image.Image, str]:
        content, cause = fetcher.fetch(row["url"])
        if content is not None:
            try:
                with Image.open(io.BytesIO(normalised(content, download.decode))) as image:
                    return image.convert("RGB"), f"{image.width} x {image.height}"
            except (UnusableError, OSError) as error:
                cause = str(error)
        return Image.new("RGB", _BLANK, "lightgray"), str(cause)

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(_THREADS))
        if download.sidecar:
            logs = Path(stack.enter_context(TemporaryDirectory(prefix="koala-sample-")))
            stack.enter_context(sidecar(download, rows[0]["url"], logs))
        found = list(progress(threads.map(fetched, rows), "pictures", total=len(rows)))
    sheet = contact_sheet(
        [(image, f"{what}: {row['caption']}") for (image, what), row in zip(found, rows, strict=True)]
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
    except (OSError, ValueError) as error:
        raise KoalaError(f"cannot write {file}: {error}") from None
    return [what for _, what in found]


def _cell(name: str, value: Any) -> str:
    """Return a column's value as a cell shows it: one line, without what a terminal would obey. Long captions are cut."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown[:_CAPTION] if name == "caption" else shown
