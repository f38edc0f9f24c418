"""The report: table, grid, plots."""

import numpy as np
from PIL import Image

from koala.demo.attributes import Attributes
from koala.demo.prompts import ShapesPrompts
from koala.demo.shapes import draw, sample_scene
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompts import seeded_prompts
from koala.evaluate.report import table, write
from koala.plots import grid, tiles

MEASURED = {
    "teacher": {"unet_parameters": 1000, "step_ms": 20.0, "attributes/all": 0.9},
    "before": {"unet_parameters": 310, "step_ms": 8.0, "attributes/all": 0.0, "agreement_db": 8.0},
    "after": {"unet_parameters": 310, "step_ms": 8.0, "attributes/all": 0.85, "agreement_db": 20.0},
}
METRICS = (Attributes(), Psnr())


def test_table_shows_size_and_speed_beside_the_teachers() -> None:
    columns, rows = table("koala-700m", MEASURED, METRICS)
    after = dict(zip(columns, rows[2], strict=True))
    assert after["model"] == "koala-700m after"
    assert after["size"] == "31%"
    assert after["speed"] == "2.50 x"
    assert after["attributes right"] == "85.0%"
    assert dict(zip(columns, rows[0], strict=True))["PSNR to teacher"] == "-"


def test_report_is_written(tmp_path) -> None:
    full = {
        name: values | {f"attributes/{what}": 0.5 for what in ("size", "colour", "shape", "background")}
        for name, values in MEASURED.items()
    }
    prompts = seeded_prompts(ShapesPrompts(), 5, 0)
    images = [draw(sample_scene(0, index), 32) for index in range(5)]
    write(tmp_path, "koala-700m", full, METRICS, dict.fromkeys(full, images), prompts, rows=3)
    assert (tmp_path / "summary.md").read_text().count("\n") == 5
    assert (tmp_path / "summary.txt").read_text().splitlines()[2].startswith("teacher ")
    assert Image.open(tmp_path / "plots" / "grid.png").height > 3 * 96
    assert Image.open(tmp_path / "plots" / "attributes.png").width > 500


def test_grid_shows_prompts_down_and_models_across() -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    sheet = np.asarray(grid(["one", "two"], {"a": [red, blue], "b": [blue, red]}))
    cells = [(190 + 48, 28 + 48), (190 + 102 + 48, 28 + 48), (190 + 48, 28 + 102 + 48)]
    assert [tuple(sheet[y, x]) for x, y in cells] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert tiles([red] * 5, across=4).size == (4 * 102 + 6, 2 * 102 + 6)
