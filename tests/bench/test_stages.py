"""The passes that `koala bench stages` measures do their work, on a few images."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from koala.bench import stages, stages_worker
from koala.data.shards import read_shards
from koala.errors import KoalaError


def test_each_pass_does_its_work_and_is_measured(tmp_path: Path) -> None:
    stages._write_images(tmp_path / "images", 12)
    for name in ("judge", "decide", "write", "encode"):
        figures = stages_worker.measure(name, str(tmp_path), port=0)
        assert set(figures) == {"seconds", "cpu_seconds", "peak_bytes"}
        assert figures["peak_bytes"] > 10 * 2**20
    assert len(list(read_shards(tmp_path / "kept"))) == 12, "none is a duplicate of another"
    assert pq.read_table(tmp_path / "latents/00000.parquet")["error"].null_count == 12


def test_a_pass_that_is_none_is_said() -> None:
    with pytest.raises(KoalaError, match="no pass 'caption' to measure: choose from download, judge"):
        stages.bench([10], ["caption"], None)
