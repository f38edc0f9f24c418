"""Metrics against values worked out by hand; the report's table; grids."""

import numpy as np
import pytest
from PIL import Image

from koala.demo.shapes import Attributes, draw, sample_scene
from koala.errors import KoalaError
from koala.evaluate.attributes import attribute_accuracy
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.latency import step_latency
from koala.evaluate.metrics import agreement, clip_score
from koala.evaluate.prompts import load_prompts
from koala.evaluate.report import table, write
from koala.grid import grid, tiles

CONFIG = {"prompts": "shapes", "count": 5, "metrics": ("attributes",), "steps": 2, "guidance": 1.0}


def test_attribute_accuracy_counts_each_attribute_and_all_of_them() -> None:
    asked = [Attributes("large", "red", "circle", "white")] * 4
    seen = [
        Attributes("large", "red", "circle", "white"),
        Attributes("small", "red", "circle", "white"),
        Attributes("small", "blue", "circle", "white"),
        None,
    ]
    answers = iter(seen)
    measured = attribute_accuracy([Image.new("RGB", (4, 4))] * 4, asked, lambda _: next(answers))
    expected = {"size": 1, "colour": 2, "shape": 3, "background": 3, "all": 1, "nothing": 1}
    assert measured == {f"attributes/{name}": count / 4 for name, count in expected.items()}


def test_drawn_pictures_have_all_attributes_right() -> None:
    scenes = [sample_scene(3, index) for index in range(40)]
    measured = attribute_accuracy([draw(scene, 32) for scene in scenes], [scene.attributes for scene in scenes])
    assert measured["attributes/all"] == 1


def test_agreement_is_the_mean_psnr() -> None:
    gray = [Image.new("RGB", (4, 4), (100, 100, 100))] * 2
    other = [Image.new("RGB", (4, 4), (110, 110, 110)), Image.new("RGB", (4, 4), (101, 101, 101))]
    assert agreement(other, gray) == pytest.approx((10 * np.log10(255**2 / 100) + 10 * np.log10(255**2)) / 2, rel=1e-5)


def test_clip_score_never_counts_below_zero() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array([[0.6, 0.8], [0.0, -1.0]])
    assert clip_score([], [], lambda _: images, lambda _: texts) == pytest.approx(100 * 0.6 / 2)


def test_prompts_are_taken_in_turn_with_seeds_of_their_own(tmp_path) -> None:
    prompts = load_prompts(EvaluateConfig(**(CONFIG | {"count": 110, "seed": 7})))
    assert prompts[0].text == prompts[108].text and prompts[0].seed == 7 and prompts[108].seed == 115
    assert len({prompt.asked for prompt in prompts}) == 108
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n a ship \n")
    own = load_prompts(EvaluateConfig(**(CONFIG | {"prompts": str(file), "metrics": (), "count": 3})))
    assert [prompt.text for prompt in own] == ["a fox", "a ship", "a fox"]
    file.write_text("\n")
    with pytest.raises(KoalaError, match="holds no prompt"):
        load_prompts(EvaluateConfig(**(CONFIG | {"prompts": str(file), "metrics": ()})))
    with pytest.raises(KoalaError, match="not there"):
        load_prompts(EvaluateConfig(**(CONFIG | {"prompts": "nowhere.txt", "metrics": ()})))


MEASURED = {
    "teacher": {"unet_parameters": 1000, "step_ms": 20.0, "attributes/all": 0.9},
    "before": {"unet_parameters": 310, "step_ms": 8.0, "attributes/all": 0.0, "agreement_db": 8.0},
    "after": {"unet_parameters": 310, "step_ms": 8.0, "attributes/all": 0.85, "agreement_db": 20.0},
}


def test_table_shows_size_and_speed_beside_the_teachers() -> None:
    columns, rows = table("koala-700m", MEASURED)
    after = dict(zip(columns, rows[2], strict=True))
    assert after["model"] == "koala-700m after" and after["size"] == "31%" and after["speed"] == "2.50 x"
    assert after["attributes right"] == "85.0%" and dict(zip(columns, rows[0], strict=True))["PSNR to teacher"] == "-"


def test_report_is_written(tmp_path) -> None:
    full = {
        name: values | {f"attributes/{what}": 0.5 for what in ("size", "colour", "shape", "background")}
        for name, values in MEASURED.items()
    }
    prompts = load_prompts(EvaluateConfig(**CONFIG))
    images = [draw(sample_scene(0, index), 32) for index in range(5)]
    write(tmp_path, "koala-700m", full, {name: images for name in full}, prompts, rows=3)
    assert (tmp_path / "summary.md").read_text().count("\n") == 5
    assert (tmp_path / "summary.txt").read_text().splitlines()[2].startswith("teacher ")
    assert Image.open(tmp_path / "grid.png").height > 3 * 96
    assert Image.open(tmp_path / "attributes.png").width > 500
    assert (tmp_path / "attributes.csv").read_text().splitlines()[0] == "model,attribute,right"


def test_grid_shows_prompts_down_and_models_across() -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    sheet = np.asarray(grid(["one", "two"], {"a": [red, blue], "b": [blue, red]}))
    cells = [(190 + 48, 28 + 48), (190 + 102 + 48, 28 + 48), (190 + 48, 28 + 102 + 48)]
    assert [tuple(sheet[y, x]) for x, y in cells] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert tiles([red] * 5, across=4).size == (4 * 102 + 6, 2 * 102 + 6)


def test_latency_of_a_smaller_unet_is_lower(tiny_teacher) -> None:
    from diffusers import StableDiffusionXLPipeline

    from koala.config import load
    from koala.unet.build import build_student

    unet = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True).unet
    student = build_student(unet, load().student("koala-700m"))
    seconds = step_latency({"teacher": unet, "student": student}, tokens=8, batch=1, repeats=9)
    assert 0 < seconds["student"] < seconds["teacher"]
