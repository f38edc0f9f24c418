import hashlib
import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from koala.data import filter as stage
from koala.data.config import FilterConfig, FilterMachine
from koala.data.dedup import NearDuplicates, dhash
from koala.data.rules import Ascii, Aspect, Blocklist, Rule, Scores, Size, View, Words, broken_rule, look
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
    assert broken_rule(bad, look(bad.image), RULES) == rule


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
    assert broken_rule(good, look(good.image), RULES) is None


def test_the_first_rule_in_order_counts() -> None:
    bad = sample(original_width=10, caption="x", aesthetic=0.0)
    assert broken_rule(bad, look(bad.image), RULES) == "too_small"


def test_sizes_are_the_images_own_where_nothing_else_is_known() -> None:
    small = sample(original_width=None, original_height=None, **SCORES)
    assert broken_rule(small, look(small.image), RULES) == "too_small"


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="is no regular expression"):
        Blocklist(patterns=("(",))


class Shouting(Rule):
    """A rule that the package does not know."""

    kind: Literal["shouting"] = "shouting"
    at_most: int

    def broken(self, sample: Sample, view: View) -> str | None:
        return "shouting" if sample.caption.count("!") > self.at_most else None


def test_rules_are_written_and_read_with_their_options() -> None:
    config = FilterConfig(rules=(*RULES, Shouting(at_most=1)))
    written = config.recipe()["rules"]
    assert written[0] == {"kind": "size", "at_least": 40}
    assert written[-1] == {"kind": "shouting", "at_most": 1}
    assert broken_rule(sample(caption="a very good horse!!", **SCORES), View(picture()), config.rules) == "shouting"
    assert broken_rule(sample(caption="a very good horse!", **SCORES), View(picture()), config.rules) is None


# Duplicates.


def test_dhash_tells_what_is_near_from_what_is_not() -> None:
    original = picture(1, (64, 64))
    like = Image.open(io.BytesIO(encoded(original.resize((48, 48)), "JPEG", quality=60)))

    def distance(a: Image.Image, b: Image.Image) -> int:
        return (dhash(a) ^ dhash(b)).bit_count()

    assert distance(original, like) <= 4
    assert distance(original, picture(2, (64, 64))) > 15
    assert distance(original, ImageOps.mirror(original)) > 15
    ramp = Image.fromarray(np.tile(np.arange(0, 90, 10, dtype=np.uint8), (8, 1)))
    assert dhash(ramp) == 2**64 - 1
    assert dhash(ImageOps.mirror(ramp)) == 0


@pytest.mark.parametrize("bits", [0, 1, 4, 15])
def test_near_duplicates_are_what_comparing_all_with_all_gives(bits: int) -> None:
    chance = random.Random(bits)
    values = [chance.getrandbits(64) for _ in range(30)]
    for _ in range(300):
        value = chance.choice(values[:30])
        for place in chance.sample(range(64), chance.randint(0, bits + 3)):
            value ^= 1 << place
        values.append(value)
    near, kept = NearDuplicates(bits), []
    for value in values:
        fresh = all((value ^ other).bit_count() > bits for other in kept)
        kept += [value] * fresh
        assert near.add(value) is fresh
    assert 30 < len(kept) < len(values)


def test_near_duplicates_do_not_take_quadratic_time() -> None:
    """20,000 hashes would be 200,000,000 comparisons."""
    comparisons = 0

    class Counted(int):
        def __xor__(self, other: int) -> int:
            nonlocal comparisons
            comparisons += 1
            return int(self) ^ int(other)

    chance = random.Random(0)
    near = NearDuplicates(3)
    assert sum(near.add(Counted(chance.getrandbits(64))) for _ in range(20_000)) > 19_990
    assert 1000 < comparisons < 40_000


# The stage.


CONFIG = FilterConfig(rules=(Words(),))
REPORT = ("report.json", "rules.png", "words.png", "samples.png", "dropped.png")


def write_shards(samples: list[Sample], shard_size: int = 4) -> Path:
    with ShardWriter(Path("images"), shard_size) as writer:
        for each in samples:
            writer.write(each)
    return Path("images")


def outcome(out: Path) -> dict[str, str]:
    """Key -> `kept`, or the rule."""
    rules = {row["key"]: row["rule"] for row in pq.read_table(out / "dropped.parquet").to_pylist()}
    return rules | {each.key: "kept" for each in read_shards(out)}


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
    stage.filter(FilterConfig(rules=(Words(),), near_duplicate_bits=4, shard_size=2), images, out, recorder)

    assert list(outcome(out).items()) == [
        ("000000002", "duplicate_image"),
        ("000000003", "duplicate_url"),
        ("000000004", "near_duplicate"),
        ("000000005", "few_words"),
        ("000000006", "undecodable"),
        ("000000000", "kept"),
        ("000000001", "kept"),
        ("000000007", "kept"),
        ("000000008", "kept"),
    ]
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
        "caption_words": {"4": 4},
    }
    assert recorder.logged["kept"] == 4
    assert recorder.logged["dropped.few_words"] == 1
    for name in REPORT[1:]:
        assert name in recorder.files
        assert Image.open(out / name).width > 300
    assert {file.name for file in out.iterdir()} == {
        "00000.tar",
        "00001.tar",
        "dropped.parquet",
        "manifest.json",
        *REPORT,
    }, "work in progress is left behind"


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_out_has_the_same_bytes_in_whatever_order_samples_came_and_at_each_call(out: Path, recorder: Any) -> None:
    config = FilterConfig(rules=(Words(),), shard_size=5)
    samples = [sample(number % 9, caption="short" if number == 3 else "a good long caption") for number in range(8)]
    stage.filter(config, write_shards(samples, shard_size=8), out, recorder)
    first = digests(out)
    stage.filter(config, write_shards(samples[::-1], shard_size=8), out, recorder)
    assert digests(out) == first


def test_processes_make_no_difference(out: Path, recorder: Any) -> None:
    images = write_shards([sample(number) for number in range(8)])
    config = FilterConfig(rules=(Words(),), near_duplicate_bits=2)
    stage.filter(config, images, out, recorder)
    first = digests(out)
    Path("pooled").mkdir()
    pooled = config.model_copy(update={"machine": FilterMachine(processes=2)})
    stage.filter(pooled, images, Path("pooled"), recorder)
    assert digests(Path("pooled")) == first
    assert pooled.resume_key() == config.resume_key()


def test_a_killed_run_goes_on(out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_shards([sample(number) for number in range(8)])
    judged = []

    def judge(each: Sample, config: FilterConfig, judge: Any = stage.judge) -> dict[str, Any]:
        judged.append(each.key)
        if len(judged) == 6:
            raise KeyboardInterrupt
        return judge(each, config)

    monkeypatch.setattr(stage, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        stage.filter(CONFIG, images, out, recorder)
    assert [file.name for file in out.iterdir()] == [STATE]
    stage.filter(CONFIG, images, out, recorder)
    assert [int(key) for key in judged] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7], "the first shard was finished"
    assert list(outcome(out).values()) == ["kept"] * 8
    assert not (out / STATE).exists()


def test_a_run_killed_while_it_writes_starts_writing_anew(
    out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_shards([sample(number) for number in range(8)])
    config = FilterConfig(rules=(Words(),), shard_size=2)
    stage.filter(config, images, out, recorder)
    whole = digests(out)
    with monkeypatch.context() as patched:
        patched.setattr(stage.FilterReport, "keep", lambda report, each: None if each.key < "000000005" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.filter(config, images, out, recorder)
    (out / "00009.tar").write_bytes(b"of a run over more samples")
    assert len(list((out / STATE / "judged").iterdir())) == 2
    assert not (out / "report.json").exists()
    stage.filter(config, images, out, recorder)
    assert digests(out) == whole


def test_nothing_kept_is_one_line(out: Path, recorder: Any) -> None:
    images = write_shards([sample(0, caption="x"), sample(1, caption="y"), sample(2, image=b"")])
    with pytest.raises(KoalaError, match=r"^nothing is kept of 3 samples; most often: few_words \(2\)"):
        stage.filter(CONFIG, images, out, recorder)
    assert not (out / "report.json").exists()
    assert not shards(out)


def test_no_shards_is_one_line(out: Path, recorder: Any) -> None:
    Path("images").mkdir()
    with pytest.raises(KoalaError, match="holds no shards: run `dvc repro download`"):
        stage.filter(CONFIG, Path("images"), out, recorder)
