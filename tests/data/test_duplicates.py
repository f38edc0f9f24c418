"""Duplicates among real photographs and drawings that look alike; the kill, the scores and broken shards of the filter."""

import hashlib
import io
import os
import random
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.processes import mine, wait_until
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images
from stages import digests

from koala.data import dedup
from koala.data.config import FilterConfig, NearDuplicates
from koala.data.dedup import BATCH, Groups, near_pairs
from koala.data.filter import filter
from koala.data.fingerprints import pattern, plane_hashes
from koala.data.judge import judge_shards
from koala.data.registration import correlations, miniature, pixels
from koala.data.rules.scores import Scores
from koala.data.shards import Sample, ShardWriter, shards
from koala.errors import KoalaError
from koala.run import NoRun

NEAR = FilterConfig(near_duplicates=NearDuplicates())


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def scenes() -> list[Image.Image]:
    """Parts of two photographs, flags of the same colours, and blank pages with a line."""
    found = []
    for image in load_sample_images().images:
        photograph = Image.fromarray(image)
        found += [photograph.crop((x, y, x + 210, y + 210)) for x in (0, 210, 420) for y in (0, 210)]
    for colours in permutations(("red", "white", "blue", "green"), 3):
        flag = Image.new("RGB", (300, 200))
        pen = ImageDraw.Draw(flag)
        for stripe, colour in enumerate(colours):
            pen.rectangle((100 * stripe, 0, 100 * stripe + 100, 200), fill=colour)
        found.append(flag)
    for line in range(6):
        page = Image.new("RGB", (200, 300), "white")
        ImageDraw.Draw(page).text((20, 30 + 40 * line), "a line " * (line + 1), "black")
        found.append(page)
    return found


def write(images: list[bytes], folder: Path = Path("images"), shard_size: int = 10) -> Path:
    with ShardWriter(folder, shard_size) as writer:
        for index, image in enumerate(images):
            writer.write(
                Sample(f"{index:09d}", image, "jpg", f"caption {index}", {"url": f"https://example.com/{index}"})
            )
    return folder


def verdicts(out: Path) -> list[dict]:
    return [row for file in sorted((out / "verdicts").iterdir()) for row in pq.read_table(file).to_pylist()]


def test_pictures_that_only_look_alike_stay(out: Path) -> None:
    filter(NEAR, write([jpeg(scene) for scene in scenes()]), Path("scores"), out, NoRun())
    assert [row["rule"] for row in verdicts(out)] == [None] * 42


def test_the_largest_of_several_forms_stays_and_they_are_one_group(out: Path) -> None:
    originals = scenes()[:36]
    forms = [
        *(jpeg(scene.resize((scene.width // 2, scene.height // 2)), 50) for scene in originals),
        *(jpeg(scene) for scene in originals),
        *(jpeg(ImageEnhance.Brightness(scene).enhance(0.85)) for scene in originals),
    ]
    filter(NEAR, write(forms), Path("scores"), out, NoRun())
    rows = verdicts(out)
    for index in range(36):
        group = rows[index::36]
        assert [row["rule"] for row in group] == ["near_duplicate", None, "near_duplicate"]
        assert {row["group"] for row in group} == {index}, "numbered by the first member"


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut a share off each side."""
    width, height = image.size
    box = (left * width, top * height, width - right * width, height - bottom * height)
    return image.crop(tuple(map(round, box)))


def test_a_copy_whose_sides_are_cut_off_is_found_without_embeddings(out: Path) -> None:
    photographs = scenes()[:12]
    cuts = [(0.05, 0, 0, 0), (0, 0, 0.05, 0.03), (0.02, 0.03, 0.03, 0.02), (0, 0.05, 0, 0)]
    crops = [cropped(scene, *cuts[index % 4]) for index, scene in enumerate(photographs)]
    filter(NEAR, write([jpeg(scene) for scene in photographs + crops]), Path("scores"), out, NoRun())
    assert [row["rule"] for row in verdicts(out)] == [None] * 12 + ["near_duplicate"] * 12


@pytest.mark.parametrize(("cosine", "dropped"), [(0.85, [None, "near_duplicate", None]), (None, [None] * 3)])
def test_embeddings_propose_and_do_not_decide(cosine: float | None, dropped: list, out: Path) -> None:
    """All three embeddings are equal; the second image is a crop of the first, the third another photograph."""
    first, other = scenes()[0], scenes()[8]
    images = [jpeg(first), jpeg(cropped(first, 0.05, 0.05, 0.05, 0.05)), jpeg(other)]
    Path("scores").mkdir()
    columns = {
        "key": [f"{index:09d}" for index in range(3)],
        "sha256": pa.array([hashlib.sha256(each).digest() for each in images], pa.binary(32)),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(24, np.float16) / np.sqrt(8)), 8),
    }
    pq.write_table(pa.table(columns), Path("scores/00000.parquet"))
    config = FilterConfig(near_duplicates=NearDuplicates(thumbnail=1, cosine=cosine))
    filter(config, write(images), Path("scores"), out, NoRun())
    assert [row["rule"] for row in verdicts(out)] == dropped


def ring(width: int) -> Image.Image:
    image = Image.new("RGB", (400, 400), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 390, 390), outline="black", width=width)
    return image


def test_a_chain_of_pictures_each_like_the_next_is_no_group(out: Path) -> None:
    """Rings from thin to full: each is like its neighbours, the first is not like the last (as 1,318 stars of Open Clip Art)."""
    folder = write([jpeg(ring(width)) for width in range(4, 190, 3)])
    filter(NEAR, folder, Path("scores"), out, NoRun())
    found = verdicts(out)
    looks = pixels([miniature(ring(width)) for width in range(4, 190, 3)])
    kept = {row["group"]: index for index, row in enumerate(found) if row["rule"] is None}
    dropped = [index for index, row in enumerate(found) if row["rule"] == "near_duplicate"]
    assert 5 < len(kept) < 30
    assert len(dropped) == 62 - sum(row["rule"] is None for row in found) > 20
    stayed = [kept[found[index]["group"]] for index in dropped]
    found_alike = correlations(looks[np.minimum(dropped, stayed)], looks[np.maximum(dropped, stayed)])
    assert found_alike.min() > 0.99  # 0.992 after JPEG
    assert sorted({row["group"] for row in found} - {None}) == list(range(len(kept.keys() - {None})))


def test_a_chain_goes_by_names_and_by_what_is_like_a_head() -> None:
    chain = dedup.Chain()
    assert chain.head(10, {1, "u"}, ()) == 10
    assert chain.head(11, {2, "v"}, {1}) == 10
    assert chain.head(12, {3}, {2}) == 12  # like one that went: it stays
    assert chain.head(13, {4, "u"}, ()) == 10
    assert chain.head(14, {5}, {3, 1}) == 10


def test_skewed_hashes_are_searched_in_the_time_of_sorting_and_pairs_are_found() -> None:
    """A third of the pictures is white but for a part."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3000, 768), dtype=np.uint8)
    pixels[rng.random(3000) < 0.3, :512] = 255
    pixels[2700:] = np.clip(pixels[:300] + rng.integers(-9, 10, (300, 768)), 0, 255)
    compared = 0

    def vectors(rows: pa.Table) -> np.ndarray:
        nonlocal compared
        compared += len(rows)
        return pattern(np.stack([np.frombuffer(row, np.uint8) for row in rows["thumbnail"].to_pylist()]))

    groups = Groups()
    for keys in plane_hashes(pattern(pixels)).T:
        thumbnails = pa.array([row.tobytes() for row in pixels])
        table = pa.table({"position": np.arange(3000), "key": keys, "thumbnail": thumbnails})
        connection = duckdb.connect()
        connection.register("picture", table)
        for left, right in near_pairs(connection, "SELECT * FROM picture", vectors, 0.992):
            groups.add(left, right)
    positions, numbers = groups.members()
    assert compared < 2 * 12 * 3000
    found = dict(zip(positions.tolist(), numbers.tolist(), strict=True))
    assert len(found) == 600
    assert all(found[index] == found[2700 + index] for index in range(300))


def test_neighbours_in_two_batches_are_compared() -> None:
    groups = (np.arange(2 * BATCH + 100) + 1) // 2  # a pair lies over each end of a batch
    vectors = np.random.default_rng(0).normal(size=(len(groups), 32))[groups]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with duckdb.connect() as connection:
        rows = f"SELECT range AS position, CAST(0 AS UBIGINT) AS key FROM range({len(groups)})"
        found = list(near_pairs(connection, rows, lambda table: vectors[table["position"].to_numpy()], 0.95))
    pairs = {tuple(sorted(pair)) for left, right in found for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert pairs == {(place, place + 1) for place in range(1, len(groups) - 1, 2)}


def test_groups_are_transitive() -> None:
    groups = Groups()
    groups.add(np.array([7, 1, 9]), np.array([8, 9, 3]))
    groups.add(np.array([8]), np.array([20]))
    positions, numbers = groups.members()
    assert positions.tolist() == [1, 3, 7, 8, 9, 20]
    assert numbers.tolist() == [0, 0, 1, 1, 0, 1]


# Scores.


def scored(images: Path, folder: Path, **changed: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = [jpeg(scene) for scene in scenes()[:4]]
    columns = {
        "key": [f"{index:09d}" for index in range(4)],
        "sha256": pa.array([hashlib.sha256(each).digest() for each in data], pa.binary(32)),
        "aesthetic": pa.array([4, 5, 6, 7], pa.float32()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.eye(4, 8, dtype=np.float16).ravel()), 8),
    }
    pq.write_table(pa.table({**columns, **changed}), folder / "00000.parquet")
    return folder


def test_scores_are_joined_by_key_and_judged(tmp_path: Path) -> None:
    images = write([jpeg(scene) for scene in scenes()[:4]], tmp_path / "images")
    config = FilterConfig(rules=(Scores(at_least={"aesthetic": 5.5}),))
    (table,) = judge_shards(shards(images), config, tmp_path / "judged", scored(images, tmp_path / "scores"))
    rows = pq.read_table(table).to_pylist()
    assert [(row["rule"], row["aesthetic"]) for row in rows] == [
        ("score.aesthetic", 4),
        ("score.aesthetic", 5),
        (None, 6),
        (None, 7),
    ]
    assert all(row["embedding"] and row["embedding_0"] is not None for row in rows)


@pytest.mark.parametrize(
    "changed",
    [
        {"key": [f"{index:09d}" for index in range(1, 5)]},
        {"sha256": pa.array([b"0" * 32] * 4, pa.binary(32))},
        {"sha256": ["a"] * 4},
    ],
)
def test_scores_of_other_samples_are_refused(changed: dict, tmp_path: Path) -> None:
    images = write([jpeg(scene) for scene in scenes()[:4]], tmp_path / "images")
    scores = scored(images, tmp_path / "scores", **changed)
    with pytest.raises(KoalaError, match=r"scores/00000.parquet .*make the scores again"):
        judge_shards(shards(images), NEAR, tmp_path / "judged", scores)


# Broken shards.


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"<html>not found</html>",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-10240],
        lambda data: data[: data.index(b"000000011.jpg")] + b"\xff" * 512 + data[data.index(b"000000011.jpg") + 512 :],
        lambda data: data + b"more",
        lambda data: data.replace(b'{"url"', b'["url"'),
    ],
)
def test_a_broken_shard_is_one_line_that_names_it(broken: bytes, out: Path) -> None:
    images = write([jpeg(scene) for scene in scenes()[:12]])
    file = images / "00001.tar"
    file.write_bytes(broken(file.read_bytes()) if callable(broken) else broken)
    with pytest.raises(KoalaError, match=r"^images/00001.tar"):
        filter(NEAR, images, Path("scores"), out, NoRun())


def test_a_shard_that_changed_or_vanished_after_it_was_judged_is_named(out: Path) -> None:
    from koala.data.decide import decide
    from koala.data.filter import write_kept

    images = write([jpeg(scene) for scene in scenes()[:12]])
    judged = judge_shards(shards(images), NEAR, out / "state/judged")
    plan = decide(judged, NEAR, out / "state", out)
    write([jpeg(scene) for scene in scenes()[12:24]])
    with pytest.raises(KoalaError, match=r"^images/00000.tar has changed"):
        write_kept(images, plan, NEAR, out)
    (images / "00000.tar").unlink()
    with pytest.raises(KoalaError, match=r"^images/00000.tar is missing"):
        write_kept(images, plan, NEAR, out)
    assert not shards(out)


# Kills.


STAGE = """
from pathlib import Path
from koala.data.config import FilterConfig, FilterMachine, NearDuplicates
from koala.data.filter import filter
from koala.run import NoRun
if __name__ == "__main__":
    config = FilterConfig(near_duplicates=NearDuplicates(), shard_size=7, machine=FilterMachine(processes=2))
    filter(config, Path("images"), Path("scores"), Path("cut"), NoRun())
"""


@pytest.mark.usefixtures("forked")
def test_killed_again_and_again_it_makes_the_same_bytes(out: Path) -> None:
    forms = [jpeg(scene, quality) for quality in (95, 60) for scene in scenes()]
    images = write(forms, shard_size=9)
    filter(NEAR.model_copy(update={"shard_size": 7}), images, Path("scores"), out, NoRun())
    Path("stage.py").write_text(STAGE)
    Path("cut").mkdir()
    chance, kills = random.Random(0), 0
    for made in (0, 4, 8, 12, None):  # files that are there when it is killed, or a little later
        process = subprocess.Popen([sys.executable, Path("stage.py").resolve()])
        if made is None:
            assert process.wait(300) == 0
            break
        while process.poll() is None and sum(path.is_file() for path in Path("cut").rglob("*")) <= made:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        kills += process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: not mine(os.getcwd()), 20)  # no worker outlives the stage
    wait_until(lambda: not mine(os.getcwd()), 20)
    assert kills
    assert digests(Path("cut")) == digests(out)
    assert [row["key"] for row in verdicts(Path("cut"))] == [f"{index:09d}" for index in range(len(forms))]
