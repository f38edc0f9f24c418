"""The report: table, grid, plots."""

import numpy as np
from PIL import Image

from koala.demo.attributes import Attributes
from koala.demo.prompts import ShapesPrompts
from koala.demo.shapes import draw, sample_scene
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompts import seeded_prompts
from koala.evaluate.report import table, write
from koala.evaluate.statistics import Estimate
from koala.plots import grid, tiles

MEASURED = {
    "teacher": {"unet_parameters": 1000, "step_ms": 20.0, "attributes/all": 0.9},
    "before": {"unet_parameters": 310, "step_ms": 8.0, "attributes/all": 0.0, "agreement_db": 8.0},
    "after": {"unet_parameters": 310, "step_ms": 8.0, "attributes/all": 0.85, "agreement_db": 20.0},
}
SCORES = {
    "teacher": {"attributes/all": Estimate(0.9, (0.871, 0.93), (0.88, 0.92))},
    "before": {
        "attributes/all": Estimate(0.0, (0, 0), (0, 0)),
        "agreement_db": Estimate(8.0, (7.5, 8.5), (7.6, 8.4)),
    },
    "after": {
        "attributes/all": Estimate(0.85, (0.812, 0.89), (0.82, 0.88)),
        "agreement_db": Estimate(20.0, (19.25, 21.0), (19.4, 20.8)),
    },
}
COMPARED = {"share_of_teacher/attributes/all": Estimate(0.944, (0.91, 1.002), (0.92, 0.99))}


def test_table_shows_size_and_speed_beside_the_teachers(make_config) -> None:
    config = make_config(metrics=(Attributes(), Psnr()))
    columns, rows = table("koala-700m", MEASURED, SCORES, COMPARED, config)
    after = dict(zip(columns, rows[2], strict=True))
    assert after["model"] == "koala-700m after"
    assert after["size"] == "31%"
    assert after["speed"] == "2.50 x"
    assert after["attributes right"] == "85.0% (81.2-89.0)"
    assert after["of teacher's"] == "94.4% (91.0-100.2)"
    assert after["PSNR to teacher"] == "20.0 dB (19.2-21.0)"
    assert columns[-3:] == ["attributes right", "of teacher's", "PSNR to teacher"]
    assert [row[-2] for row in rows[:2]] == ["-", "-"]
    assert dict(zip(columns, rows[0], strict=True))["PSNR to teacher"] == "-"


def test_report_is_written(tmp_path, make_config) -> None:
    full = {
        name: values | {f"attributes/{what}": 0.5 for what in ("size", "colour", "shape", "background")}
        for name, values in MEASURED.items()
    }
    prompts = seeded_prompts(ShapesPrompts(), 5, 0)
    images = [draw(sample_scene(0, index), 32) for index in range(5)]
    config = make_config(metrics=(Attributes(), Psnr()), grid_rows=3)
    write(tmp_path, "koala-700m", full, SCORES, COMPARED, dict.fromkeys(full, images), prompts, config)
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
