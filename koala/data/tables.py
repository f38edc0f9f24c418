"""A list of URLs in files: parquet, CSV, TSV and JSON, from disk, from the Hugging Face Hub or from S3.

Keep this module light to import: `TableSource` is read with params.yaml. Readers import their libraries when they run.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from koala.data.table_config import TableConfig
from koala.errors import KoalaError

if TYPE_CHECKING:
    import pyarrow as pa


class TableSource(TableConfig):
    """Tables in parquet, CSV, TSV or JSON, from disk, from a data set on the Hugging Face Hub, or from S3."""

    def tables(self, dropped: Counter[str]) -> "Iterator[pa.Table]":
        """Yield the usable rows of each file, a batch at a time; count the others in `dropped`, by reason.

        Raises KoalaError if a file cannot be fetched or read, lacks a column, or is not what the pin says.
        """
        import polars as pl

        from koala.data.rows import Usable
        from koala.data.table_files import located
        from koala.data.table_reader import read

        files = located(self)
        files.check_pin(self)
        usable, types = Usable(self, dropped), dict[str, str]()
        for name in files.names:
            with files.fetched(name) as file:
                for batch in read(file, name, self):
                    table = usable.of(batch).to_arrow(compat_level=pl.CompatLevel.oldest())
                    table = _as_strings(table)
                    now = {column: str(table.schema.field(column).type) for column in self.carry}
                    types = types or now
                    if changed := [column for column in self.carry if now[column] != types[column]]:
                        column = changed[0]
                        raise KoalaError(
                            f"{name}: column {column!r} holds {now[column]}, and {types[column]} in files before: "
                            "take it out of source.carry"
                        )
                    yield table
                    if usable.enough:
                        return


def _as_strings(table: "pa.Table") -> "pa.Table":
    """Return a table whose texts are `string`, as img2dataset and older readers know it."""
    import pyarrow as pa

    kinds = [pa.string() if pa.types.is_large_string(field.type) else field.type for field in table.schema]
    return table.cast(pa.schema(list(zip(table.schema.names, kinds, strict=True))))
