"""The stage `evaluate`, called with folders."""

import json
import math
import shutil
import weakref
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from koala import generate
from koala.demo.attributes import Attributes
from koala.errors import KoalaError
from koala.evaluate import cost
from koala.evaluate import evaluate as module
from koala.evaluate.evaluate import evaluate
from koala.evaluate.images import image_file
from koala.evaluate.metrics.base import Column, Metric, SetFigure
from koala.evaluate.metrics.clip_score import ClipScore
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompts import seeded_prompts
from koala.publish.gate import Requirement, judge
from koala.run import STATE, NoRun

pytestmark = pytest.mark.usefixtures("counted_once")


@pytest.fixture
def judged(tiny_teacher, students, finished):
    """Folders that `evaluate` takes: the teacher, the student before and after, and the teacher's images."""
    before, after = students
    return {"teacher": tiny_teacher, "student": before, "distilled": after, "reference": finished}


def test_each_model_is_measured_on_its_own_images(judged, make_config, tmp_path, recorder, projection) -> None:
    """Before and after have other weights: mixing them up, or with the teacher, changes the values."""
    config, out = make_config(), tmp_path / "evaluation"
    evaluate(config, **judged, out=out, run=recorder)
    metrics = json.loads((out / "metrics.json").read_text())
    folders = {"teacher": judged["teacher"], "before": judged["student"], "after": judged["distilled"]}
    expected: dict[str, float] = {}
    for model, folder in folders.items():
        prompts = seeded_prompts(config.prompts, config.count, config.seed)
        seeded = [(prompt.text, prompt.seed) for prompt in prompts]
        images = generate.generate(generate.load(folder, config.dtype), seeded, config.sampling)
        expected[model] = np.mean([projection(image) for image in images])
    assert all(abs(expected[one] - expected[other]) > 1 for one, other in combinations(expected, 2)), expected
    for model, value in expected.items():
        assert metrics[model]["projection"] == pytest.approx(value, abs=0.2), model
    assert metrics["share_of_teacher/projection"] == pytest.approx(expected["after"] / expected["teacher"], abs=0.01)

    assert metrics["difference_from_teacher/projection"] == pytest.approx(
        expected["after"] - expected["teacher"], abs=0.2
    )
    comparisons = {"share_of_teacher/projection", "difference_from_teacher/projection"}
    sections = {"intervals", "bounds", "categories", "pinned"}
    assert (
        set(metrics)
        == {"teacher", "before", "after", "size_of_teacher", "speed_up", "image_speed_up"} | comparisons | sections
    )
    assert set(metrics["intervals"]) == {"teacher", "before", "after"} | comparisons
    assert set(metrics["bounds"]) == {"projection", "agreement_db"} | comparisons
    for name, (lower, upper) in metrics["bounds"].items():
        value = metrics["after"].get(name, metrics.get(name))
        low, high = metrics["intervals"]["after"].get(name) or metrics["intervals"][name]
        assert low <= lower <= value <= upper <= high, name
        assert recorder.logged[f"lower_bound/{name}"] == lower
    costs = {"unet_parameters", "unet_flops", "step_ms", "image_ms", "disk_bytes"}
    assert set(metrics["teacher"]) == {"projection"} | costs
    assert metrics["teacher"]["disk_bytes"] > metrics["after"]["disk_bytes"] > 4 * metrics["after"]["unet_parameters"]
    assert metrics["teacher"]["unet_flops"] > metrics["after"]["unet_flops"] > 2 * metrics["after"]["unet_parameters"]
    # Two steps, text encoders and VAE take longer than two steps.
    assert metrics["teacher"]["image_ms"] > metrics["teacher"]["step_ms"]
    assert set(metrics["after"]) == set(metrics["before"]) == {*metrics["teacher"], "agreement_db"}
    assert metrics["before"]["unet_parameters"] == metrics["after"]["unet_parameters"]
    assert metrics["size_of_teacher"] == metrics["after"]["unet_parameters"] / metrics["teacher"]["unet_parameters"] < 1
    assert metrics["speed_up"] > 0

    assert recorder.logged["projection"] == metrics["after"]["projection"]
    assert recorder.logged["before.projection"] == metrics["before"]["projection"]
    assert recorder.logged["teacher.step_ms"] == metrics["teacher"]["step_ms"]
    assert recorder.images == [("images", 0), ("grid", 0)]
    assert {"report.html", "metrics.json", "summary.md", "summary.txt", "plots", "curves"} <= set(recorder.files)


def test_the_evaluation_holds_what_dvc_declares_and_no_more(judged, make_config, tmp_path) -> None:
    out = tmp_path / "evaluation"
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "old.png").write_bytes(b"of an earlier call")
    evaluate(make_config(metrics=(Attributes(),)), **judged, out=out, run=NoRun())
    assert {path.name for path in out.iterdir()} == {
        "curves",
        "metrics.json",
        "plots",
        "report.html",
        "samples",
        STATE,
        "summary.md",
        "summary.txt",
        "values.parquet",
    }
    assert {path.name for path in (out / "plots").iterdir()} == {"grid.png", "attributes.png", "curves.png"}
    assert (out / "curves" / "curves.csv").read_text() == "step,loss/total\n1,0.5\n"
    assert "koala-700m after" in (out / "summary.md").read_text()
    # A pipeline without curves, from elsewhere: a table without rows.
    bare = shutil.copytree(judged["distilled"], tmp_path / "bare", ignore=shutil.ignore_patterns("curves.*"))
    evaluate(make_config(), **{**judged, "distilled": Path(bare)}, out=out, run=NoRun())
    assert {path.name for path in (out / "plots").iterdir()} == {"grid.png"}
    assert (out / "curves" / "curves.csv").read_text() == "step,loss/total\n"


def test_an_interrupted_evaluation_resumes(judged, make_config, tmp_path, monkeypatch) -> None:
    config, out = make_config(), tmp_path / "evaluation"
    loaded = []
    plain = generate.load

    def load(model, dtype):
        loaded.append(model)
        return plain(model, dtype)

    monkeypatch.setattr(generate, "load", load)
    monkeypatch.setattr(module, "costs", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        evaluate(config, **judged, out=out, run=NoRun())
    assert loaded == [judged["student"], judged["distilled"]]  # the teacher's pipeline is not needed
    monkeypatch.undo()
    monkeypatch.setattr(generate, "load", load)
    loaded.clear()
    image_file(out / STATE / "after", 3).unlink()
    evaluate(config, **judged, out=out, run=NoRun())
    assert loaded == [
        judged["distilled"],
        judged["teacher"],
        judged["distilled"],
    ]  # one image; then what an image costs


def test_figures_name_what_they_depend_on(judged, make_config, tmp_path) -> None:
    out = tmp_path / "evaluation"
    evaluate(make_config(metrics=(Attributes(), Psnr())), **judged, out=out, run=NoRun())
    assert json.loads((out / "metrics.json").read_text())["pinned"] == {
        "sampler": "EulerDiscreteScheduler",
        "steps": 2,
        "guidance": 1.0,
        "size": "32x32",
        "count": 4,
        "prompts": 4,
        "seed": 7,
        "dtype": "float32",
        "metrics": {"attributes": {}, "psnr": {}},
        "confidence": 0.95,
        "resamples": 10_000,
    }


def test_one_model_is_in_memory_at_a_time(judged, make_config, tmp_path, monkeypatch) -> None:
    """A pipeline and its U-Net are gone when the next is loaded."""
    alive: list[weakref.ref] = []
    loaded = []

    def watched(load):
        def watch(folder, dtype):
            assert [ref() for ref in alive if ref() is not None] == [], "a model before it is alive"
            model = load(folder, dtype)
            alive.extend(weakref.ref(part) for part in {model, getattr(model, "unet", model)})
            loaded.append((type(model).__name__, folder))
            return model

        return watch

    monkeypatch.setattr(generate, "load", watched(generate.load))
    monkeypatch.setattr(cost, "_load_unet", watched(cost._load_unet))
    evaluate(make_config(), **judged, out=tmp_path / "evaluation", run=NoRun())
    teacher, before, after = judged["teacher"], judged["student"], judged["distilled"]
    pipelines = [("StableDiffusionXLPipeline", before), ("StableDiffusionXLPipeline", after)]
    # The teacher's images are there: its U-Net is loaded before and after the student's, its pipeline for what an image costs.
    unets = [("UNet2DConditionModel", folder) for folder in (teacher, after, teacher)]
    assert loaded == pipelines + unets + [("StableDiffusionXLPipeline", folder) for folder in (teacher, after)]


def test_a_machine_whose_speed_drifts_favours_neither(judged, make_config, tmp_path, monkeypatch) -> None:
    """Equal U-Nets, each timed a tenth slower than the one before it."""
    seconds = iter([1.0, 1.1, 1.2])
    monkeypatch.setattr("koala.evaluate.latency.step_latency", lambda *_: next(seconds))
    evaluate(make_config(), **judged, out=tmp_path / "evaluation", run=NoRun())
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["speed_up"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([1.0, math.nan, 1.0, 1.0], "the metric odd gives no number odd for image 1"),
        ([1.0, None, 1.0, 1.0], "the metric odd gives no number odd for image 1"),
        ([1.0], "the metric odd gives no number odd for each image: 1 values of 4"),
    ],
)
def test_a_metric_gives_a_number_for_each_image(judged, make_config, tmp_path, values, line) -> None:
    class Odd(Metric):
        kind: str = "odd"

        def measure(self, images, prompts, reference):
            return {"odd": values}

    with pytest.raises(KoalaError, match=line):
        evaluate(make_config(metrics=(Odd(),)), **judged, out=tmp_path / "evaluation", run=NoRun())


def test_a_figure_of_all_images_has_an_interval_where_it_has_draws(judged, make_config, tmp_path) -> None:
    class Sets(Metric):
        kind: str = "sets"
        columns: ClassVar = {"drawn": Column("drawn", "{:.1f}"), "bare": Column("bare", "{:.1f}", interval=False)}

        def measure_set(self, images, prompts, reference):
            if reference is None:
                return {}
            return {"drawn": SetFigure(5.0, np.linspace(4, 6, 101)), "bare": SetFigure(7.0)}

    out = tmp_path / "evaluation"
    evaluate(make_config(metrics=(Sets(),)), **judged, out=out, run=NoRun())
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["after"]["drawn"], metrics["after"]["bare"]) == (5, 7)
    assert "drawn" not in metrics["teacher"]
    low, high = metrics["intervals"]["after"]["drawn"]
    assert 4 <= low < 5 < high <= 6
    assert set(metrics["intervals"]["after"]) == set(metrics["bounds"]) == {"drawn"}
    assert f"5.0 ({low:.1f}-{high:.1f})" in (out / "summary.md").read_text()
    assert [verdict.bound for verdict in judge(metrics, [Requirement(metric="drawn", at_most=5.5)])] == [
        metrics["bounds"]["drawn"][1]
    ]


def test_a_reference_of_other_prompts_is_refused_before_any_work(judged, make_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        KoalaError, match=r"other prompts or seeds than evaluate\.prompts asks for: run `koala reference`"
    ):
        evaluate(make_config(seed=8), **judged, out=tmp_path / "evaluation", run=NoRun())


def test_a_model_that_is_not_there_is_said_before_any_work(judged, make_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("a model was loaded"))
    config = make_config(metrics=(Psnr(), ClipScore(model=str(tmp_path / "nowhere"))))
    with pytest.raises(KoalaError, match=r"there is no folder .*nowhere \(evaluate.metrics\)"):
        evaluate(config, **judged, out=tmp_path / "evaluation", run=NoRun())


def test_a_student_of_another_shape_is_refused(judged, make_config, tmp_path) -> None:
    with pytest.raises(KoalaError, match="differ: give one student before and after distillation"):
        evaluate(make_config(), **{**judged, "student": judged["teacher"]}, out=tmp_path / "evaluation", run=NoRun())
