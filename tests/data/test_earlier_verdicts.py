"""The filter over a list that changed: what was judged before is taken over, to the bytes of a run from nothing."""

import hashlib
import io
import pickle
import shutil
from collections.abc import Iterable
from contextlib import chdir
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stages import digests

from koala.data import judge as judging
from koala.data.config import FilterConfig, NearDuplicates, Quota
from koala.data.earlier_verdicts import EarlierVerdicts, earlier_verdicts, identity
from koala.data.filter import filter
from koala.data.forget import Forgotten
from koala.data.rules.scores import Scores
from koala.data.rules.size import Size
from koala.data.rules.words import Words
from koala.data.shards import Sample, ShardWriter, read_shard, shards
from koala.run import EARLIER, STATE, NoRun

RULES = (Words(), Size(at_least=40), Scores(at_least={"beauty": 3}))
CONFIG = FilterConfig(
    rules=RULES,
    near_duplicates=NearDuplicates(),
    quotas=(Quota(by="host", at_most=3, best="beauty"),),
    shard_size=4,
    forget=(Forgotten(url="https://3.example/7.jpg", because="asked for", on=date(2026, 1, 1)),),
)
Row = tuple[int, str]
"""The image's number and the caption."""
OLD: list[Row] = [(number, f"a picture of number {number}") for number in range(24)]
# Three gone, one moved to the front, two new, one of another caption.
NEW: list[Row] = [OLD[20], *OLD[2:9], (30, "the first new picture"), *OLD[10:20], *OLD[21:23]]
NEW += [(31, "the second new picture"), (23, "another caption of number 23")]
KNOWN = [row for row in NEW if row in OLD]


def picture(number: int) -> bytes:
    """Smooth random colours; 4 and 5 are the same picture, 6 none."""
    if number == 6:
        return b"<html>"
    pixels = np.random.default_rng(4 if number == 5 else number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((64, 48 + (number == 5)), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, rows: Iterable[Row], better: int | None = None) -> tuple[Path, Path]:
    """Shards of seven, and their scores. `better`: the image whose score is another."""
    with ShardWriter(folder / "images", 7) as writer:
        for place, (number, caption) in enumerate(rows):
            meta = {"url": f"https://{number % 4}.example/{number}.jpg", "key": f"{place:09d}", "license": "by"}
            writer.write(Sample(f"{place:09d}", picture(number), "png", caption, meta))
    (folder / "scores").mkdir()
    for shard in shards(folder / "images"):
        samples = list(read_shard(shard))
        numbers = [int(sample.meta["url"].split("/")[-1][:-4]) for sample in samples]
        beauty = [9.0 if number == better else None if number == 6 else 1 + number % 9 for number in numbers]
        embeddings = [np.random.default_rng(100 + number).standard_normal(16).astype(np.float16) for number in numbers]
        table = {
            "key": [sample.key for sample in samples],
            "sha256": pa.array([hashlib.sha256(sample.image).digest() for sample in samples], pa.binary(32)),
            "beauty": pa.array(beauty, pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(np.concatenate(embeddings), 16),
        }
        pq.write_table(pa.table(table), folder / "scores" / f"{shard.stem}.parquet")
    return folder / "images", folder / "scores"


def run(
    name: str, inputs: tuple[Path, Path], config: FilterConfig = CONFIG, earlier: Path | None = None, to: Any = None
) -> Path:
    """Run the filter, with what was made last where the runner puts it."""
    out = Path(name)
    (out / STATE).mkdir(parents=True)
    if earlier:
        (out / STATE / EARLIER).symlink_to(earlier.resolve())
    filter(config, *inputs, out, to or NoRun())
    assert not (out / STATE).exists()
    return out


@pytest.fixture(scope="module")
def made_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old list's samples, `old`, and what the filter made of them, `before`."""
    folder = tmp_path_factory.mktemp("list")
    with chdir(folder):
        run("before", write(Path("old"), OLD))
    return folder


@pytest.fixture
def before(made_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return what the filter made of the old list, in the current folder."""
    shutil.copytree(made_before, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("before")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of the samples that are judged."""
    urls: list[str] = []

    def judge(sample: Sample, config: FilterConfig, judge: Any = judging.judge) -> dict[str, Any]:
        urls.append(sample.meta["url"].split("/")[-1])
        return judge(sample, config)

    monkeypatch.setattr(judging, "judge", judge)
    return urls


def test_of_a_changed_list_only_what_is_new_is_judged(
    before: Path, judged: list[str], recorder: Any, capsys: Any
) -> None:
    """New are two rows, one of another caption, one of another score. What was taken down is judged again, and kept nowhere."""
    new = write(Path("new"), NEW, better=12)
    anew = run("anew", new)
    judged.clear()
    out = run("out", new, earlier=before, to=recorder)
    assert digests(out) == digests(anew)
    assert sorted(judged) == ["12.jpg", "23.jpg", "30.jpg", "31.jpg", "7.jpg"]
    assert (recorder.logged["reused"], recorder.logged["new"]) == (len(KNOWN) - 2, 5)
    assert f"{len(KNOWN) - 2} of the judgements taken over from the last run" in capsys.readouterr().err
    rules = {row["rule"] for file in (out / "verdicts").iterdir() for row in pq.read_table(file).to_pylist()}
    assert rules >= {None, "forgotten", "near_duplicate", "undecodable", "score.beauty", "quota.host"}
    for verdicts, own in zip(sorted((out / "verdicts").iterdir()), sorted((out / "judged").iterdir()), strict=True):
        for verdict, row in zip(pq.read_table(verdicts).to_pylist(), pq.read_table(own).to_pylist(), strict=True):
            assert (row["identity"] is None) == (verdict["rule"] == "forgotten")
            if verdict["rule"] == "forgotten":
                assert set(row.values()) == {None}


@pytest.mark.parametrize("changes", [{"forget": ()}, {"near_duplicates": None}, {"quotas": (), "shard_size": 3}])
def test_what_was_judged_serves_other_decisions(before: Path, changes: dict[str, Any], recorder: Any) -> None:
    """The runner offers it where `beside_rows` differ, also for the same list."""
    config = CONFIG.model_copy(update=changes)
    assert config.of_rows(config.recipe()) == CONFIG.of_rows(CONFIG.recipe())
    inputs = Path("old/images"), Path("old/scores")
    out = run("out", inputs, config, earlier=before, to=recorder)
    assert digests(out) == digests(run("anew", inputs, config))
    assert recorder.logged["reused"] == len(OLD) - 1


def test_a_table_that_was_damaged_is_made_anew(before: Path, recorder: Any, capsys: Any) -> None:
    inputs = Path("old/images"), Path("old/scores")
    for part in ("judged/00001.parquet", "verdicts/00002.parquet"):
        content = bytearray((before / part).read_bytes())
        content[len(content) // 2] ^= 1
        (before / part).write_bytes(content)
    out = run("out", inputs, earlier=before, to=recorder)
    assert digests(out) == digests(run("anew", inputs))
    assert recorder.logged["reused"] == len(OLD) - 14
    said = capsys.readouterr().err
    assert "a shard of the last run is made anew: out/state/earlier/judged/00001.parquet has another content" in said
    assert "made anew: out/state/earlier/verdicts/00002.parquet" in said


def test_without_its_shards_what_was_judged_is_taken_over_without_a_table_nothing_is(
    before: Path, recorder: Any
) -> None:
    for shard in shards(before):
        shard.unlink()
    inputs = Path("old/images"), Path("old/scores")
    run("out", inputs, earlier=before, to=recorder)
    assert recorder.logged["reused"] == len(OLD) - 1
    (before / "verdicts/00001.parquet").unlink()
    run("other", inputs, earlier=before, to=recorder)
    assert recorder.logged["reused"] == 0


def test_what_was_judged_is_found_in_another_process(before: Path) -> None:
    (Path("out") / STATE).mkdir(parents=True)
    (Path("out") / STATE / EARLIER).symlink_to(before.resolve())
    known = earlier_verdicts(Path("out"), processes=1)
    names = [name for name in pq.read_table(before / "judged")["identity"].to_pylist() if name]
    found = pickle.loads(pickle.dumps(known)).find([*names, b"0" * 32])
    assert isinstance(known, EarlierVerdicts)
    assert found.keys() == set(names)
    assert {row["caption"] for row in found.values()} == {caption for number, caption in OLD if number != 7}


def test_a_sample_is_the_same_but_for_its_key() -> None:
    sample = Sample("000000001", b"image", "png", "a caption", {"key": "000000001", "url": "u", "beauty": 0.5})
    moved = Sample("7", b"image", "png", "a caption", {"url": "u", "beauty": 0.5, "key": "7"})
    assert identity(sample) == identity(moved)
    others = [
        Sample("1", b"imagf", "png", "a caption", sample.meta),
        Sample("1", b"image", "png", "a captiom", sample.meta),
        Sample("1", b"image", "png", "a caption", sample.meta | {"beauty": 0.25}),
        Sample("1", b"image", "png", "a caption", sample.meta | {"url": "\udc00"}),
        Sample("1", b"image", "png", "a caption", {"url": "u"}),
    ]
    assert len({identity(each) for each in [sample, *others]}) == 6
