"""The examples, as their headers say to run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(example: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / "examples" / example, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def latents(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = tmp_path_factory.mktemp("images")
    for index in range(6):
        Image.new("RGB", (48, 32), (40 * index, 0, 0)).save(images / f"{index}.jpg")
        (images / f"{index}.txt").write_text("a large red circle\n")
    out = images.parent / "latents"
    run("encode_images.py", images, tiny_teacher, out, "--bucket", "32x32", "--bucket", "32x48")
    return out


def test_a_folder_of_images_is_encoded(latents: Path) -> None:
    from koala.data.latents import LatentSet

    found = LatentSet(latents)
    assert {bucket: len(indices) for bucket, indices in found.buckets.items()} == {(32, 48): 6}
    assert found[0].caption == "a large red circle"


@pytest.mark.usefixtures("forked")
def test_a_task_is_trained_by_hand(latents: Path, tiny_teacher: Path) -> None:
    lines = run("train_task.py", tiny_teacher, latents, "--steps", 3, "--batch", 2).splitlines()
    assert [line.split(":")[0] for line in lines] == ["1", "2", "3"]
    assert "task " in lines[0]
    assert "feature/UP1 " in lines[0]


@pytest.mark.usefixtures("forked")
def test_a_finetune_is_inspected(tiny_teacher: Path) -> None:
    shown = run("inspect_finetune.py", tiny_teacher, "--size", 32)
    assert "KOALA-700M: 383,316 parameters (47.4%)" in shown
    assert "  UP1: pairs [0, 2], [1, 1] of [2, 2] layers" in shown


@pytest.mark.usefixtures("forked")
def test_a_folder_of_pictures_goes_through_the_data_stages(tmp_path: Path) -> None:
    """Captions beside the pictures, a translation for the fifth file, a name for a picture without, a broken one, and a copy."""
    folder = tmp_path / "set é 1"
    folder.mkdir()
    for index in range(6):
        picture = Image.linear_gradient("L").rotate(60 * index).resize((80, 90))
        picture.convert("RGB").save(folder / f"picture {index}.png")
        (folder / f"picture {index}.txt").write_text(
            f"A large drawing of number {index}\nde.utf8=Eine große Zeichnung der Zahl {index} im Schnee\n"
        )
    (folder / "a_copy.png").write_bytes((folder / "picture 0.png").read_bytes())
    (folder / "broken.svg").write_text("<svg/>")
    said = run("real_set.py", folder, "--out", tmp_path / "out")
    lines = {name: rest for name, _, rest in (line.partition(": ") for line in said.splitlines())}
    table, images, kept = (json.loads(lines[f"{name}.json"]) for name in ("table/stats", "images/stats", "kept/report"))
    assert table == {"rows": 8, "dropped": {}}
    assert images["errors"] == {"no image": 1}
    assert kept["samples"] == 7
    assert kept["dropped"]["duplicate_image"] == 1
    assert kept["dropped"]["language"] >= 1
