"""Parquet tables that another stage, or someone else, has written: what cannot be read is one line that names the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from koala.errors import KoalaError, line_of


@contextmanager
def named(file: Path, remedy: str = "restore it (`dvc checkout`), or make it again") -> Iterator[None]:
    """Raise KoalaError in place of what a reader inside the block raises for a file that is no whole table."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        raise KoalaError(f"{file} is truncated, or no table of this kind ({line_of(error)}): {remedy}") from None
