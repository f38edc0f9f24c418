import hashlib
import io
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from koala.cli import app
from koala.data import forget
from koala.data.config import FilterConfig, NearDuplicates
from koala.data.decide import decide
from koala.data.filter import filter
from koala.data.forget import Forgotten
from koala.data.judge import judge_shards
from koala.data.rules.size import Size
from koala.data.shards import Sample, ShardWriter, read_shards
from koala.errors import KoalaError
from koala.run import NoRun

TODAY = date(2026, 1, 1)


def drawing(number: int, size: int = 128) -> bytes:
    image = Image.new("RGB", (128, 128), (40 * number % 256, 90, 200))
    pen = ImageDraw.Draw(image)
    pen.ellipse((10 + 9 * number, 20, 60 + 9 * number, 90), "white")
    pen.rectangle((5, 100 - 11 * number, 50, 120 - 9 * number), "black")
    stream = io.BytesIO()
    image.resize((size, size)).save(stream, "PNG")
    return stream.getvalue()


def write(samples: list[tuple[int, int]], folder: Path = Path("images")) -> Path:
    """(number of the drawing, size) -> shards of two samples."""
    with ShardWriter(folder, 2) as writer:
        for index, (number, size) in enumerate(samples):
            fetched = hashlib.sha256(f"file {index}".encode()).hexdigest()
            meta = {"url": f"https://example.com/{index}", "sha256": fetched}
            writer.write(Sample(f"{index:09d}", drawing(number, size), "png", "a caption", meta))
    return folder


def rules(config: FilterConfig, images: Path = Path("images"), out: Path = Path("out")) -> list[str | None]:
    filter(config, images, Path("scores"), out, NoRun())
    rows = [row for file in sorted((out / "verdicts").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert [row["key"] for row in rows if not row["rule"]] == [sample.key for sample in read_shards(out)]
    return [row["rule"] for row in rows]


def entry(**what: str) -> Forgotten:
    return Forgotten.model_validate({**what, "because": "asked for", "on": TODAY})


def test_what_is_taken_down_is_dropped_with_its_duplicates(out: Path) -> None:
    write([(0, 128), (1, 128), (1, 128), (1, 256), (2, 128)])
    near = NearDuplicates()
    assert rules(FilterConfig()) == [None, None, "duplicate_image", None, None]
    by_url = FilterConfig(forget=(entry(url="https://example.com/2"),))
    assert rules(by_url) == [None, "forgotten", "forgotten", None, None]
    assert rules(by_url.model_copy(update={"near_duplicates": near})) == [None, *["forgotten"] * 3, None]
    stored = FilterConfig(forget=(entry(sha256=hashlib.sha256(drawing(2)).hexdigest()),))
    assert rules(stored)[4] == "forgotten"
    fetched = FilterConfig(forget=(entry(sha256=hashlib.sha256(b"file 0").hexdigest().upper()),))
    assert rules(fetched) == ["forgotten", None, "duplicate_image", None, None]
    look = pq.read_table(out / "verdicts/00000.parquet")["dhash"].to_pylist()[1] ^ 0b101
    assert rules(FilterConfig(forget=(entry(dhash=f"{look:016x}"),))) == [None, *["forgotten"] * 3, None]


def test_an_image_that_a_rule_drops_takes_its_duplicates_down_too(out: Path) -> None:
    write([(0, 96), (0, 128), (1, 128)])
    config = FilterConfig(rules=(Size(at_least=128),), near_duplicates=NearDuplicates())
    assert rules(config) == ["too_small", None, None]
    config = config.model_copy(update={"forget": (entry(url="https://example.com/0"),)})
    assert rules(config) == ["forgotten", "forgotten", None]


def test_a_hash_list_that_grew_counts_in_a_run_that_is_resumed(out: Path) -> None:
    write([(0, 128), (1, 128)])
    listed, state = Path("list.txt"), Path("state")
    listed.write_text(f"{hashlib.sha256(drawing(1)).hexdigest()}\n")
    config = FilterConfig(hash_lists=("list.txt",))
    judged = judge_shards([Path("images/00000.tar")], config, state)
    decide(judged, config, state, out)
    listed.write_text(listed.read_text() + f"{hashlib.sha256(drawing(0)).hexdigest()}\n")
    decide(judged, config, state, out)
    assert pq.read_table(out / "verdicts/00000.parquet")["rule"].to_pylist() == ["forgotten", "forgotten"]


def test_lists_of_hashes_are_read_and_a_bad_line_is_named(out: Path) -> None:
    write([(0, 128), (1, 128)])
    listed = Path("list.txt")
    config = FilterConfig(hash_lists=("list.txt",))
    listed.write_text(f"# of the police\n\n{hashlib.sha256(drawing(1)).hexdigest()}  # one\n")
    assert rules(config) == [None, "forgotten"]
    listed.write_text("0123\n")
    with pytest.raises(KoalaError, match=r"^list.txt, line 1: neither a SHA-256"):
        rules(config)
    listed.unlink()
    with pytest.raises(KoalaError, match=r"^filter.hash_lists: list.txt cannot be read"):
        rules(config)


@pytest.mark.parametrize("what", [{}, {"url": "u", "dhash": "0" * 16}, {"sha256": "12"}, {"dhash": "x" * 16}])
def test_an_entry_that_names_no_image_is_refused(what: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KoalaError):
        forget.add("why", tmp_path / "forget.yaml", **what)
    assert not (tmp_path / "forget.yaml").exists()


def test_entries_are_appended_and_read(tmp_path: Path) -> None:
    file = tmp_path / "forget.yaml"
    assert forget.read(file) == ()
    added = [forget.add('by: asked, "twice"', file, url="https://x.org/a b"), forget.add("b", file, dhash="0F" * 8)]
    assert list(forget.read(file)) == added
    file.write_text("- {url: a}")
    with pytest.raises(KoalaError, match=r"forget.yaml does not hold takedowns: .*`koala data forget`"):
        forget.read(file)


def test_the_command_says_where_a_sample_stands_and_the_next_filter_leaves_it_out(workspace: Path) -> None:
    from koala.params import load

    made = workspace / "artifacts/smoke"
    images = write([(0, 128), (1, 128), (2, 128)], made / "images")
    outcomes = [
        {"key": f"{n:09d}", "url": f"https://example.com/{n}", "sha256": "00", "status": "success"} for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(outcomes), images / "00000.parquet")
    (made / "kept").mkdir()
    assert rules(FilterConfig(), images, made / "kept") == [None] * 3
    (made / "latents").mkdir()
    pq.write_table(pa.table({"key": ["000000000", "000000001"]}), made / "latents/00000.parquet")

    told = CliRunner().invoke(app, ["data", "forget", "--url", "https://example.com/1", "--because", "asked for"])
    assert told.exit_code == 0, told.output
    assert told.output.startswith(
        "images: 1 (000000001)\nkept: 1 (000000001)\nlatents: 1 (000000001)\nadded to forget.yaml"
    )
    config = load().config("filter")
    assert isinstance(config, FilterConfig)
    found = config.model_copy(update={"rules": ()})
    (workspace / "out").mkdir()
    assert rules(found, images, workspace / "out") == [None, "forgotten", None]
