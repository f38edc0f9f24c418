"""A sample's way through the artifacts, by its key or its URL."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import verdicts as made
from data.verdicts import verdict

from koala.data.explain import Value, Way, explain, show_way
from koala.data.latents import COLUMNS
from koala.errors import KoalaError

NOUNS = ("table", "images", "kept", "latents")
KEPT, SHORT, MISSING, TWIN = (f"https://example.com/{number}.jpg" for number in range(4))


def write(folder: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")


def downloaded(number: int, url: str, error: str | None = None) -> dict[str, Any]:
    status = "failed_to_download" if error else "success"
    sizes = {"width": 32, "height": 24, "original_width": 64, "original_height": 48}
    return {"key": f"{number:09d}", "url": url, "status": status, "error_message": error, **sizes, "sha256": "ab" * 32}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Four samples: one kept, one with too few words, one that could not be fetched, and a duplicate of the first."""
    table, images, kept, latents = (tmp_path / noun for noun in NOUNS)
    urls = {KEPT: 6.0, SHORT: 5.5, MISSING: 5.0, TWIN: 4.0}
    write(
        table, "part-00000", [{"url": url, "caption": f"of {url}", "aesthetic": score} for url, score in urls.items()]
    )
    write(images, "00000", [downloaded(0, KEPT), downloaded(1, SHORT)])
    write(images, "00001", [downloaded(2, MISSING, "status 404"), downloaded(3, TWIN)])
    first = [
        verdict(0, words=4.0, aesthetic=6.0, group=1, dhash=255),
        verdict(1, "few_words", words=2.0, aesthetic=float("nan")),
    ]
    made.write(kept, [first, [verdict(3, "near_duplicate", words=5.0, group=1)]])
    (kept / "report.json").write_text(json.dumps({"bounds": {"words": [3, 20], "aesthetic": [None, 9.0]}}))
    latent = {"key": "000000000", "caption": "", "file": "00000-32x64.safetensors", "row": 7, "flipped": True}
    sizes = {"bucket_height": 32, "bucket_width": 64, "crop_top": 3, "crop_left": 5}
    write(latents, "00000", [latent | sizes], COLUMNS)
    return {noun: tmp_path / noun for noun in NOUNS}


def said(way: Way, capsys: pytest.CaptureFixture[str]) -> str:
    """What is shown of a way, each run of white space as one space."""
    show_way(way, as_json=False)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("sample", ["000000000", KEPT])
def test_the_whole_way_of_a_kept_sample(
    sample: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    way = explain(sample, **folders)
    assert (way.key, way.url) == ("000000000", KEPT)
    assert way.table
    assert (way.table["caption"], way.table["aesthetic"]) == (f"of {KEPT}", 6.0)
    assert way.download
    assert way.download["status"] == "success"
    assert way.verdict
    assert (way.verdict["rule"], way.verdict["shard"], way.verdict["dhash"]) == (None, "00000", f"{255:016x}")
    assert way.values["words"] == Value(4.0, 3, 20, outside=False)
    assert way.latent
    assert (way.latent["file"], way.latent["row"]) == ("00000-32x64.safetensors", 7)
    shown = said(way, capsys)
    assert f"caption of {KEPT}" in shown
    assert "status success input shard 00000.tar fetched 64 x 48 px stored 32 x 24 px" in shown
    assert "verdict kept input shard 00000.tar output shard 00000" in shown
    assert "words 4 3 20" in shown
    assert "outside" not in shown
    assert f"000000000 (this) kept {KEPT} 000000003 near_duplicate {TWIN}" in shown
    assert "row 7 bucket 64 x 32 px crop 5 from the left, 3 from the top flipped yes" in shown


def test_the_rule_and_the_value_that_broke_it_are_marked(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    way = explain("000000001", **folders)
    assert way.values["words"] == Value(2.0, 3, 20, outside=True)
    assert way.values["aesthetic"] == Value(None, None, 9.0, outside=False)
    shown = said(way, capsys)
    assert "verdict dropped: few_words" in shown
    assert "words 2 3 20 outside" in shown
    assert "aesthetic - - 9" in shown
    assert "latents: not in it" in shown


def test_a_failed_download_tells_its_cause(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    way = explain(MISSING, **folders)
    assert way.key == "000000002"
    shown = said(way, capsys)
    assert "status failed_to_download input shard 00001.tar cause status 404" in shown
    assert "kept: not in it" in shown


def test_a_duplicate_tells_who_was_kept(folders: dict[str, Path]) -> None:
    way = explain(TWIN, **folders)
    assert [(row["key"], row["rule"]) for row in way.group] == [("000000000", None), ("000000003", "near_duplicate")]


@pytest.mark.parametrize("ran", range(1, 4))
def test_stages_that_have_not_run_are_said(
    ran: int, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_so_far = {noun: folders[noun] if number < ran else tmp_path / "nowhere" for number, noun in enumerate(NOUNS)}
    way = explain(KEPT, **made_so_far)
    assert [part is None for part in (way.table, way.download, way.verdict, way.latent)] == [n >= ran for n in range(4)]
    shown = said(way, capsys)
    stages = ("source", "download", "filter", "encode")
    assert [f"the stage {stage} has not run" in shown for stage in stages] == [number >= ran for number in range(4)]
    assert ("no key yet" in shown) == (ran == 1)


def test_what_is_copied_stands_in_one_line(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = f"https://example.com/{'deep/' * 30}1.jpg"
    write(folders["table"], "part-00001", [{"url": long, "caption": "a", "aesthetic": 5.0}])
    write(folders["images"], "00002", [downloaded(9, long)])
    write(folders["kept"] / "verdicts", "00002", [verdict(9, "near_duplicate", group=1, url=long)], made.SCHEMA)
    show_way(explain(long, **folders), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"000000009 {long}"
    assert any(line.endswith(f"    {'ab' * 32}") for line in lines)
    group = lines[next(number for number, line in enumerate(lines) if "duplicates" in line) :][:4]
    assert [line.split() for line in group] == [
        ["duplicates", "url"],
        ["000000000", "kept", KEPT],
        ["000000003", "near_duplicate", TWIN],
        ["000000009", "(this)", "near_duplicate", long],
    ]
    assert len({line.index("url" if number == 0 else "https") for number, line in enumerate(group)}) == 1


def test_samples_of_one_url_are_named(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(folders["images"], "00002", [downloaded(8, KEPT)])
    way = explain(KEPT, **folders)
    assert (way.key, way.others) == ("000000000", ["000000008"])
    assert "also with this URL: 000000008" in said(way, capsys)


def test_json_holds_all_of_it(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    show_way(explain("000000001", **folders), as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["values"]["words"] == {"value": 2.0, "least": 3, "greatest": 20, "outside": True}
    assert len(found["verdict"]["sha256"]) == 64
    assert found["latent"] == {}


def test_a_terminal_obeys_nothing_of_a_caption(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(folders["table"], "part-00001", [{"url": "https://x", "caption": "\x1b[2J[red]\u202e", "aesthetic": 1.0}])
    shown = said(explain("https://x", **folders), capsys)
    assert "[2J[red]" in shown
    assert not {"\x1b", "\u202e"} & set(shown)


@pytest.mark.parametrize("unknown", ["000000009", "https://example.com/none.jpg", "' OR 1=1 --", ""])
def test_what_no_artifact_knows_is_one_line(unknown: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KoalaError, match="no artifact of this profile knows"):
        explain(unknown, **folders)
    with pytest.raises(KoalaError, match="no artifact of this profile knows"):
        explain(unknown, **dict.fromkeys(NOUNS, tmp_path / "nowhere"))


def test_a_broken_file_is_one_line(folders: dict[str, Path]) -> None:
    (folders["images"] / "00001.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(KoalaError, match=r"an artifact cannot be read: .*00001\.parquet"):
        explain(KEPT, **folders)
