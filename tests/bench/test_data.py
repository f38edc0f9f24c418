"""The passes that `koala bench data` measures do their work, on short lists."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from koala.bench import data, data_worker, images
from koala.bench.lists import write_list
from koala.data.shards import read_shards
from koala.errors import KoalaError


def test_each_pass_does_its_work_and_is_measured(tmp_path: Path) -> None:
    images.write_images(tmp_path / "images", 12)
    with images.served() as port:
        images.write_table(tmp_path / "table", 12, port)
        for name in data.PASSES[1:]:
            figures = data_worker.measure(name, str(tmp_path), port, "")
            assert set(figures) == {"seconds", "cpu_seconds", "peak_bytes"}
            assert figures["peak_bytes"] > 10 * 2**20
    assert len(list(read_shards(tmp_path / "downloaded"))) == 12
    assert len(list(read_shards(tmp_path / "kept"))) == 12, "none is a duplicate of another"
    assert pq.read_table(tmp_path / "latents/00000.parquet")["error"].null_count == 12


def test_a_list_is_measured_in_a_process_of_its_own(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.bench([1000, 3000], ["source"], ["jsonl"], 2, Path("raw.json"), Path("raw.png"))
    rows = json.loads(Path("raw.json").read_text())["rows"]
    assert [(row["name"], row["rows"]) for row in rows] == [("source, jsonl", 1000), ("source, jsonl", 3000)]
    for row in rows:
        assert len(row["seconds_of_rounds"]) == 2
        assert min(row["seconds_of_rounds"]) == row["seconds"], "of an even count, the lower one"
        assert row["cpu_seconds"] > 0
        assert 50 * 2**20 < row["peak_bytes"] < 600 * 2**20, "torch's memory, or the parent's, is counted"
    assert "1,000" in capsys.readouterr().out
    assert Path("raw.png").stat().st_size > 5_000


@pytest.mark.parametrize("kind", data.FORMATS)
def test_a_list_has_its_share_of_copies_and_of_rows_out_of_bounds(tmp_path: Path, kind: str) -> None:
    write_list(tmp_path / f"list.{kind}", 1_000)
    data_worker.measure("source", str(tmp_path), 0, kind)
    stats = json.loads((tmp_path / f"table-{kind}/stats.json").read_text())
    assert stats == {"rows": 970, "dropped": {"duplicate_url": 20, "where.width": 10}}


def test_what_is_none_is_said() -> None:
    with pytest.raises(KoalaError, match="no pass 'caption' to measure: choose from source, download, judge"):
        data.bench([10], ["caption"], [], 1, None, None)
    with pytest.raises(KoalaError, match="no format 'xml' to measure: choose from parquet"):
        data.bench([10], [], ["xml"], 1, None, None)
