"""Lists of URLs like those of the web, of any length, for `koala bench data`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_AT_A_TIME = 100_000
_TWICE_IN, _OUT_OF_BOUNDS_IN = 50, 100


def write_list(file: Path, rows: int) -> Path:
    """Write a list of `rows` as parquet, CSV or JSON lines, by the file's ending."""
    import pyarrow.csv
    import pyarrow.parquet

    firsts = range(0, rows, _AT_A_TIME)
    tables = (_table(first, min(_AT_A_TIME, rows - first)) for first in firsts)
    if file.suffix == ".jsonl":
        with file.open("w") as lines:
            for table in tables:
                lines.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
        return file
    writer_of = pyarrow.parquet.ParquetWriter if file.suffix == ".parquet" else pyarrow.csv.CSVWriter
    first = next(tables)
    with writer_of(file, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
    return file


def _table(first: int, count: int) -> "pa.Table":
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(first)
    paths = random.integers(0, 2**60, count)
    numbers = np.arange(first, first + count)
    numbers[_TWICE_IN - 1 :: _TWICE_IN] = numbers[_TWICE_IN - 2 :: _TWICE_IN][
        : len(numbers[_TWICE_IN - 1 :: _TWICE_IN])
    ]
    paths[_TWICE_IN - 1 :: _TWICE_IN] = paths[_TWICE_IN - 2 :: _TWICE_IN][: len(paths[_TWICE_IN - 1 :: _TWICE_IN])]
    widths = random.integers(600, 4_000, count)
    widths[::_OUT_OF_BOUNDS_IN] = 100
    pairs = list(zip(numbers.tolist(), paths.tolist(), strict=True))
    return pa.table(
        {
            "url": [
                f"https://images{n % 4001}.example{n % 7}.com/{path:x}/picture-{n}.jpg?w=1024" for n, path in pairs
            ],
            "caption": [f"a photograph of thing {n}, on a wooden table, in the light of the morning" for n, _ in pairs],
            "aesthetic": random.normal(5.5, 1, count).round(4),
            "width": widths,
            "id": [f"{path:016x}" for path in paths.tolist()],
        }
    )
