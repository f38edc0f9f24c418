import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from stages import digests

from koala.data import filter as stage
from koala.data import judge as judging
from koala.data.config import FilterConfig, FilterMachine, NearDuplicates
from koala.data.rules.ascii import Ascii
from koala.data.rules.aspect import Aspect
from koala.data.rules.base import Bounds, Rule, View
from koala.data.rules.blocklist import Blocklist
from koala.data.rules.scores import Scores
from koala.data.rules.size import Size
from koala.data.rules.words import Words
from koala.data.shards import Sample, ShardWriter, read_shards, shards
from koala.errors import KoalaError
from koala.run import STATE


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def sample(number: int = 0, image: bytes | None = None, caption: str = "a good long caption", **meta: Any) -> Sample:
    data = encoded(picture(number)) if image is None else image
    meta = {"url": f"https://example.com/{number}.jpg", "original_width": 64, "original_height": 64} | meta
    return Sample(f"{number:09d}", data, "png", caption, meta)


def bomb() -> bytes:
    """A PNG of a few bytes that says that it is 30,000 pixels wide and high."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


RULES = (
    Size(at_least=40),
    Aspect(at_most=2.0),
    Words(at_least=3, at_most=6),
    Blocklist(patterns=("(?i)buy now", r"\.jpe?g\b")),
    Ascii(at_least=0.9),
    Scores(at_least={"aesthetic": 5.0}, at_most={"watermark": 0.5}),
)
SCORES = {"aesthetic": 5.0, "watermark": 0.5}


def broken_rule(sample: Sample, rules: tuple[Rule, ...]) -> str | None:
    rule: str | None = judging.judge(sample, FilterConfig(rules=rules))["rule"]
    return rule


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("undecodable", sample(image=b"<html>")),
        ("undecodable", sample(image=b"")),
        ("undecodable", sample(image=encoded(picture())[:-200])),
        ("undecodable", sample(image=encoded(picture(), "GIF"))),
        ("decompression_bomb", sample(image=bomb())),
        ("too_small", sample(original_width=39)),
        ("too_small", sample(original_height=39)),
        ("aspect", sample(original_width=129)),
        ("aspect", sample(original_height=129)),
        ("few_words", sample(caption="two words")),
        ("few_words", sample(caption="")),
        ("many_words", sample(caption="one two three four five six seven")),
        ("blocklist", sample(caption="come and Buy Now please")),
        ("blocklist", sample(caption="this is IMG_0012.jpg again")),
        ("not_ascii", sample(caption="белая лошадь на лугу")),
        ("score.aesthetic", sample(aesthetic=4.99)),
        ("score.aesthetic", sample(aesthetic=None)),
        ("score.aesthetic", sample(aesthetic=float("nan"))),
        ("score.aesthetic", sample(aesthetic="9")),
        ("score.watermark", sample(watermark=0.51)),
    ],
)
def test_each_rule_drops_what_breaks_it(rule: str, bad: Sample) -> None:
    bad = sample(image=bad.image, caption=bad.caption, **(SCORES | bad.meta))
    assert broken_rule(bad, RULES) == rule


@pytest.mark.parametrize(
    "good",
    [
        sample(),
        sample(original_width=40, original_height=80),
        sample(caption="just three words"),
        sample(caption="a café where six people sit"),
        sample(image=encoded(picture().convert("L"))),
        sample(image=encoded(picture(), "JPEG")),
        sample(image=encoded(picture(), "WEBP")),
    ],
)
def test_rules_let_through_what_is_just_good_enough(good: Sample) -> None:
    good = sample(image=good.image, caption=good.caption, **(SCORES | good.meta))
    assert broken_rule(good, RULES) is None


def test_the_first_rule_in_order_counts() -> None:
    bad = sample(original_width=10, caption="x", aesthetic=0.0)
    assert broken_rule(bad, RULES) == "too_small"


def test_sizes_are_the_images_own_where_nothing_else_is_known() -> None:
    small = sample(original_width=None, original_height=None, **SCORES)
    assert broken_rule(small, RULES) == "too_small"


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="is no regular expression"):
        Blocklist(patterns=("(",))


class Shouting(Rule):
    """A rule that the package does not know."""

    kind: Literal["shouting"] = "shouting"
    at_most: int

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        return {"shouts": sample.caption.count("!")}

    def bounds(self) -> dict[str, Bounds]:
        return {"shouts": (None, self.at_most)}


def test_rules_are_written_and_read_with_their_options() -> None:
    config = FilterConfig(rules=(*RULES, Shouting(at_most=1)))
    written = config.recipe()["rules"]
    assert written[0] == {"kind": "size", "at_least": 40}
    assert written[-1] == {"kind": "shouting", "at_most": 1}
    assert broken_rule(sample(caption="a very good horse!!", **SCORES), config.rules) == "shouting"
    assert broken_rule(sample(caption="a very good horse!", **SCORES), config.rules) is None


# The stage.


CONFIG = FilterConfig(rules=(Words(),))
REPORT = ("report.json", "report.html", "plots", "verdicts", "judged")
SCORED = Path("scores")  # none there: nothing was scored


def write_shards(samples: list[Sample], shard_size: int = 4) -> Path:
    with ShardWriter(Path("images"), shard_size) as writer:
        for each in samples:
            writer.write(each)
    return Path("images")


def outcome(out: Path) -> dict[str, str]:
    """Key -> `kept`, or the rule."""
    rows = [row for file in sorted((out / "verdicts").iterdir()) for row in pq.read_table(file).to_pylist()]
    kept = [each.key for each in read_shards(out)]
    assert [row["key"] for row in rows if row["rule"] is None] == kept
    return {row["key"]: row["rule"] or "kept" for row in rows}


def test_a_shard_that_changed_is_judged_again(out: Path) -> None:
    for caption in ("one caption of it", "another caption, which is longer"):
        images = write_shards([sample(0, caption=caption)])
        (table,) = judging.judge_shards(shards(images), FilterConfig(), out / "judged")
        assert pq.read_table(table)["caption"].to_pylist() == [caption]


def test_the_report_counts_licences_under_either_spelling(out: Path, recorder: Any) -> None:
    images = write_shards([sample(0, license="CC0"), sample(1, licence="BY"), sample(2, license="CC0"), sample(3)])
    stage.filter(FilterConfig(), images, SCORED, out, recorder)
    assert pq.read_table(out / "verdicts/00000.parquet")["license"].to_pylist()[:2] == ["CC0", "BY"]
    section = (out / "report.html").read_text().partition('<h2 id="licences">')[2].partition("<h2")[0]
    assert [section.count(f"<bdi>{name}</bdi>") for name in ("CC0", "BY", "not known")] == [1, 1, 1]


def test_the_stage_keeps_counts_and_shows(out: Path, recorder: Any) -> None:
    same = encoded(picture(0))
    resized = encoded(picture(1).resize((40, 40)), "PNG")
    samples = [
        sample(0, status="success"),
        sample(1),
        sample(2, image=same),  # the bytes of 0
        sample(3, url="https://example.com/1.jpg"),  # the URL of 1
        sample(4, image=resized),  # looks like 1
        sample(5, caption="short"),
        sample(6, image=b"broken", caption="$broken_{mathematics"),
        sample(7, image=encoded(picture(5))),  # the bytes of one that was dropped
        sample(8),
    ]
    images = write_shards(samples)
    stage.filter(
        FilterConfig(rules=(Words(),), near_duplicates=NearDuplicates(), shard_size=2), images, SCORED, out, recorder
    )

    assert outcome(out) == {
        "000000000": "kept",
        "000000001": "kept",
        "000000002": "duplicate_image",
        "000000003": "duplicate_url",
        "000000004": "near_duplicate",
        "000000005": "few_words",
        "000000006": "undecodable",
        "000000007": "kept",
        "000000008": "kept",
    }
    assert [shard.name for shard in shards(out)] == ["00000.tar", "00001.tar"]
    first = next(read_shards(out))
    assert first.image == same
    assert first.caption == "a good long caption"
    assert first.meta == {"url": "https://example.com/0.jpg", "original_width": 64, "original_height": 64}
    assert json.loads((out / "report.json").read_text()) == {
        "samples": 9,
        "kept": 4,
        "kept_share": 0.444444,
        "dropped": {"duplicate_image": 1, "duplicate_url": 1, "few_words": 1, "near_duplicate": 1, "undecodable": 1},
        "duplicate_groups": 2,
        "bounds": {"words": [3, 300]},
        "values": {"words": {"mean": 4.0, "deviation": 0.0}},
        "caption_words": {"4": 4},
    }
    assert recorder.logged["kept"] == 4
    assert recorder.logged["dropped.few_words"] == 1
    for name in ("report.json", "report.html", "funnel.png", "dropped.png"):
        assert name in recorder.files
    assert Image.open(out / "plots" / "kept.png").width > 300
    assert {file.name for file in out.iterdir()} == {"00000.tar", "00001.tar", "manifest.json", *REPORT}, (
        "work in progress is left behind"
    )


def test_the_out_has_the_same_bytes_in_whatever_order_samples_came_and_at_each_call(out: Path, recorder: Any) -> None:
    config = FilterConfig(rules=(Words(),), shard_size=5)
    samples = [sample(number % 9, caption="short" if number == 3 else "a good long caption") for number in range(8)]
    stage.filter(config, write_shards(samples, shard_size=8), SCORED, out, recorder)
    first = digests(out)
    stage.filter(config, write_shards(samples[::-1], shard_size=8), SCORED, out, recorder)
    assert digests(out) == first


def test_processes_make_no_difference(out: Path, recorder: Any) -> None:
    images = write_shards([sample(number) for number in range(8)])
    config = FilterConfig(rules=(Words(),), near_duplicates=NearDuplicates())
    stage.filter(config, images, SCORED, out, recorder)
    first = digests(out)
    Path("pooled").mkdir()
    pooled = config.model_copy(update={"machine": FilterMachine(processes=2)})
    stage.filter(pooled, images, SCORED, Path("pooled"), recorder)
    assert digests(Path("pooled")) == first
    assert pooled.resume_key() == config.resume_key()


def test_a_killed_run_goes_on(out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_shards([sample(number) for number in range(8)])
    judged = []

    def judge(each: Sample, config: FilterConfig, judge: Any = judging.judge) -> dict[str, Any]:
        judged.append(each.key)
        if len(judged) == 6:
            raise KeyboardInterrupt
        return judge(each, config)

    monkeypatch.setattr(judging, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        stage.filter(CONFIG, images, SCORED, out, recorder)
    assert [file.name for file in out.iterdir()] == [STATE]
    stage.filter(CONFIG, images, SCORED, out, recorder)
    assert [int(key) for key in judged] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7], "the first shard was finished"
    assert list(outcome(out).values()) == ["kept"] * 8
    assert not (out / STATE).exists()


def test_a_run_killed_while_it_writes_goes_on_writing(
    out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_shards([sample(number) for number in range(8)])
    config = FilterConfig(rules=(Words(),), shard_size=2)
    stage.filter(config, images, SCORED, out, recorder)
    whole = digests(out)
    (out / "00009.tar").write_bytes(b"of a run over more samples")
    with monkeypatch.context() as patched:
        patched.setattr(
            stage, "_write_shard", lambda job, write=stage._write_shard: job.output.stem != "00002" and write(job)
        )
        patched.setattr(recorder, "metrics", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.filter(config, images, SCORED, out, recorder)
    written = {file.name: file.stat().st_mtime_ns for file in shards(out)}
    assert list(written) == ["00000.tar", "00001.tar", "00003.tar"]
    stage.filter(config, images, SCORED, out, recorder)
    assert digests(out) == whole
    assert written.items() <= {file.name: file.stat().st_mtime_ns for file in shards(out)}.items(), "they were whole"


def test_computed_scores_decide_and_travel_with_the_sample(out: Path, recorder: Any) -> None:
    samples = [sample(number) for number in range(4)]
    images = write_shards(samples)
    SCORED.mkdir()
    hashes = [hashlib.sha256(each.image).digest() for each in samples]
    table = {"key": [each.key for each in samples], "sha256": pa.array(hashes, pa.binary(32))}
    pq.write_table(pa.table(table | {"beauty": pa.array([5, 4, None, 6], pa.float32())}), SCORED / "00000.parquet")
    stage.filter(FilterConfig(rules=(Scores(at_least={"beauty": 4.5}),)), images, SCORED, out, recorder)
    assert list(outcome(out).values()) == ["kept", "score.beauty", "score.beauty", "kept"]
    assert [each.meta["beauty"] for each in read_shards(out)] == [5, 6]

    pq.write_table(pa.table(table | {"sha256": pa.array(hashes[::-1], pa.binary(32))}), SCORED / "00000.parquet")
    with pytest.raises(KoalaError, match="holds no scores of the image 000000000: make the scores again"):
        stage.filter(CONFIG, images, SCORED, out, recorder)


def test_nothing_kept_is_one_line(out: Path, recorder: Any) -> None:
    images = write_shards([sample(0, caption="x"), sample(1, caption="y"), sample(2, image=b"")])
    with pytest.raises(KoalaError, match=r"^nothing is kept of 3 samples; most often: few_words \(2\)"):
        stage.filter(CONFIG, images, SCORED, out, recorder)
    assert not shards(out)


def test_no_shards_is_one_line(out: Path, recorder: Any) -> None:
    Path("images").mkdir()
    with pytest.raises(KoalaError, match="holds no shards: run `dvc repro download`"):
        stage.filter(CONFIG, Path("images"), SCORED, out, recorder)
