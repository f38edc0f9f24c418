"""The rows of the download's shards, compared to those of img2dataset's own reader."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset.reader import Reader

from koala.data.regroup import regrouped
from koala.data.shard_rows import ShardRows
from koala.data.source import write_parts


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """130 rows in parts of 60, 60 and 10, whose row groups are smaller than a shard, or larger."""
    rows = [{"id": number, "caption": f"é {number}", "url": f"https://a.test/{number}"} for number in range(130)]
    folder = tmp_path / "table"
    folder.mkdir()
    write_parts([pa.Table.from_pylist(rows)], folder, part_rows=60)
    first = folder / "part-00000.parquet"
    pq.write_table(pq.read_table(first), first, row_group_size=7)
    return folder


def read(kind: type[Reader], table: Path, folder: Path, done: set[int]) -> Reader:
    folder.mkdir()
    return kind(str(table), "parquet", "url", "caption", None, None, ["id"], 25, done, str(folder))


def rows(file: str) -> pa.Table:
    with pa.memory_map(file) as source:
        return pa.ipc.open_file(source).read_all()


@pytest.mark.parametrize("done", [set(), {1, 3}])
def test_shards_are_those_of_img2dataset(table: Path, tmp_path: Path, done: set[int]) -> None:
    theirs = list(read(Reader, table, tmp_path / "theirs", done))
    ours = list(read(ShardRows, table, tmp_path / "ours", done))

    assert [number for number, _ in ours] == [number for number, _ in theirs]
    assert [number for number, _ in ours] == [number for number in range(7) if number not in done]
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert rows(one).equals(rows(other))
        assert rows(one).schema.equals(rows(other).schema, check_metadata=True)


def test_no_shard_is_cut_before_it_is_asked_for(table: Path, tmp_path: Path) -> None:
    shards = iter(read(ShardRows, table, tmp_path / "ours", set()))
    next(shards)
    assert len(list((tmp_path / "ours").iterdir())) == 1


def test_rows_are_regrouped_by_their_number_alone() -> None:
    table = pa.table({"number": range(10)})
    cut = [table.slice(0, 1), table.slice(1, 0), table.slice(1, 8), table.slice(9)]

    assert [len(part) for part in regrouped(cut, 3)] == [3, 3, 3, 1]
    assert [len(part) for part in regrouped(cut, 3, part_rows=5)] == [3, 2, 3, 2]
    assert pa.concat_tables(regrouped(cut, 3)).equals(table.combine_chunks())
