"""The rows of each shard of the download, cut from the parts of the table as they are asked for.

img2dataset's own reader holds a whole part of the table, and writes the rows of all its shards before the first is fetched.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset.reader import Reader

from koala.data.regroup import regrouped

BATCH_ROWS = 10_000


class ShardRows(Reader):  # type: ignore[misc]
    """img2dataset's reader of the table: the same shards of the same rows, with no more than a shard in memory."""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the number, and an Arrow file of the rows, of every shard that is not done."""
        number = self.start_shard_id
        for part in self.input_files:
            with pq.ParquetFile(part) as file:
                batches = file.iter_batches(BATCH_ROWS, columns=self.column_list, use_threads=False)
                tables = (pa.Table.from_batches([batch]) for batch in batches)
                for rows in regrouped(tables, self.number_sample_per_shard):
                    if number not in self.done_shards:
                        yield number, self._write(number, rows)
                    number += 1

    def _write(self, number: int, rows: pa.Table) -> str:
        file = Path(self.tmp_path, f"{number}.feather")
        with pa.ipc.new_file(str(file), rows.schema) as writer:
            writer.write_table(rows)
        return str(file)
