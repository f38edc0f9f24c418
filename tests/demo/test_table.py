import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from koala.data.source import source
from koala.demo import shapes
from koala.demo.server import FAULTS
from koala.demo.table import BAD_CAPTION_SHARE, FAULT_SHARES, ShapesSource, shapes_table
from koala.errors import KoalaError


def config(**changes: Any) -> ShapesSource:
    return ShapesSource(**({"kind": "shapes", "location": "http://127.0.0.1:8765/", "rows": 200, "seed": 1} | changes))


def kind(url: str) -> str:
    return url.split("/")[3]


def test_a_table_of_shapes_has_every_fault_in_its_share() -> None:
    table = shapes_table(config(rows=1000))
    kinds = Counter(map(kind, table["url"].to_pylist()))
    assert {name: kinds[name] / 1000 for name in FAULT_SHARES} == FAULT_SHARES
    assert set(FAULT_SHARES) - {"copy"} == set(FAULTS), "the server knows other faults"
    bad = 0
    for index, row in enumerate(table.to_pylist()):
        shown = int(re.search(r"(\d+)\.jpg$", row["url"])[1])
        assert (shown == index) is (kind(row["url"]) != "copy")
        bad += row["caption"] != shapes.caption(shapes.sample_scene(1, shown), 1, shown)
    assert bad == 1000 * BAD_CAPTION_SHARE


def test_copies_are_of_earlier_good_rows() -> None:
    urls = shapes_table(config(rows=1000))["url"].to_pylist()
    copies = [(index, url) for index, url in enumerate(urls) if kind(url) == "copy"]
    assert all(url.replace("/copy/", "/ok/") in urls[:index] for index, url in copies)


def test_a_table_of_shapes_follows_from_its_seed() -> None:
    scored = {"score_columns": ("aesthetic",)}
    assert shapes_table(config(**scored)).equals(shapes_table(config(**scored)))
    assert not shapes_table(config()).equals(shapes_table(config(seed=2)))
    scores = shapes_table(config(**scored))["aesthetic"].to_pylist()
    assert len(set(scores)) > 100
    assert all(0 <= score <= 10 for score in scores)


def test_the_out_has_the_same_bytes_each_time(tmp_path: Path, recorder: Any) -> None:
    """A second call on a finished out changes nothing either."""
    contents = []
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        source(config(rows=60), out=tmp_path / name, run=recorder)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] == contents[2]
    assert contents[0].keys() == {"manifest.json", "part-00000.parquet", "stats.json"}
    assert recorder.logged["rows"] == 60


def test_too_few_rows_for_all_faults_is_said() -> None:
    with pytest.raises(KoalaError, match="take 20 or more"):
        shapes_table(config(rows=5))
    assert shapes_table(config(rows=20)).num_rows == 20
