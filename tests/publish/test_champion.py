"""The champion: what a challenger is compared with, and how a person overrules the gate."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from koala.errors import KoalaError
from koala.evaluate.prompts import Prompt
from koala.evaluate.values import Values
from koala.publish import approvals, gate_page
from koala.publish.champion import champion, verdicts_on
from koala.publish.config import PublishConfig
from koala.publish.gate import Requirement
from koala.publish.promotion import judge_version
from koala.publish.publish import publish
from koala.publish.releases import approve
from koala.publish.targets.folder import FolderTarget
from koala.run import NoRun

NAME, PROMPTS, SEEDS = "koala-700m", 50, 2
PINNED = {"steps": 20, "count": PROMPTS * SEEDS, "confidence": 0.95}
Evaluate = Callable[..., Path]


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluate:
    """Make the evaluation of a student that is right in a share of its images; `wrong` shuffles in which."""

    def make(right: float, wrong: int = 0, pinned: dict | None = None, first_seed: int = 0) -> Path:
        folder = tmp_path / "evaluation" / NAME
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("plots", "samples"):
            (folder / name).mkdir(parents=True)
        prompts = [Prompt(f"prompt {number % PROMPTS}", first_seed + number) for number in range(PROMPTS * SEEDS)]
        values = (np.random.default_rng(wrong).permutation(len(prompts)) < right * len(prompts)).astype(float)
        Values(prompts, {"teacher": {"good": [1.0] * len(prompts)}, "after": {"good": list(values)}}).write(
            folder / "values.parquet"
        )
        measured = {"unet_parameters": 310, "step_ms": 1.0, "good": right}
        metrics = {"teacher": measured, "before": measured, "after": measured, "size_of_teacher": 0.31, "speed_up": 2.0}
        metrics |= {"bounds": {"good": [right, right]}, "pinned": {**PINNED, **(pinned or {})}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        for name in ("report.html", "summary.md", "plots/grid.png"):
            (folder / name).touch()
        for number in (0, 3):
            Image.new("RGB", (32, 32), (255, wrong, 0)).save(folder / "samples" / f"{number:06d}.png")
        return folder

    return make


@pytest.fixture
def config(tmp_path: Path) -> PublishConfig:
    rule = Requirement(metric="good", of="champion", at_least=1)
    targets = (FolderTarget(path=tmp_path / "shared"),)
    return PublishConfig(license="mit", require=(rule,), targets=targets, promote="automatic")


def release(config: PublishConfig, evaluation: Path, tmp_path: Path) -> None:
    """Let an evaluated student stand, without its weights."""
    folder = tmp_path / "release"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(evaluation, folder)
    config.targets[0].send(folder, NAME)


def words(config: PublishConfig, evaluation: Path) -> tuple[bool, str]:
    (verdict,) = verdicts_on(evaluation, config, champion(config, NAME))
    return verdict.passed, str(verdict)


def test_the_first_release_has_none_to_beat(config, evaluation) -> None:
    assert words(config, evaluation(0.5)) == (True, "good of champion at least 1: there is none to beat")


def test_only_a_challenger_that_is_better_than_noise_replaces_the_champion(config, evaluation, tmp_path) -> None:
    release(config, evaluation(0.7), tmp_path)
    assert words(config, evaluation(0.95))[0]
    # As good on average, wrong in other images: what the bootstrap cannot tell from noise.
    passed, verdict = words(config, evaluation(0.72, wrong=1))
    assert not passed
    assert verdict.startswith("good of champion at least 1: 1.029, lower bound 0.")
    assert not words(config, evaluation(0.5))[0]
    # The champion itself, published again.
    assert words(config, evaluation(0.7)) == (True, "good of champion at least 1: 1.000, lower bound 1.000, of itself")


def test_the_latest_version_is_the_champion_after_a_rollback_too(config, evaluation, tmp_path) -> None:
    for share in (0.5, 0.9):
        release(config, evaluation(share), tmp_path)
    assert not words(config, evaluation(0.8))[0]
    config.targets[0].shelf(NAME).point_to("v1")
    assert words(config, evaluation(0.8))[0]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"pinned": {"steps": 25}}, r"koala-700m v1 \(target folder\) was evaluated with steps 20 \(now 25\)"),
        ({"first_seed": 7}, r"was evaluated with other prompts"),
    ],
)
def test_a_champion_that_was_measured_otherwise_cannot_be_compared(config, evaluation, tmp_path, other, why) -> None:
    release(config, evaluation(0.5), tmp_path)
    (verdict,) = verdicts_on(evaluation(0.9, **other), config, champion(config, NAME))
    assert not verdict.passed
    assert verdict.judged is None
    assert re.search(why, str(verdict))
    # How intervals are computed is not what was measured.
    assert words(config, evaluation(0.9, pinned={"confidence": 0.9}))[0]


def test_a_metric_that_one_of_them_lacks_is_no_matter(config, evaluation, tmp_path) -> None:
    """A report that shows more than the champion's did is compared in what both have."""
    clip = {"model": "owner/clip", "revision": "a" * 40}
    release(config, evaluation(0.5, pinned={"metrics": {"good": {}, "clip_score": clip}}), tmp_path)
    assert words(config, evaluation(0.9, pinned={"metrics": {"good": {}, "psnr": {}}}))[0]
    other = {"metrics": {"good": {}, "clip_score": {**clip, "revision": "b" * 40}}}
    passed, verdict = words(config, evaluation(0.9, pinned=other))
    assert not passed
    assert "was evaluated with clip_score {'model': 'owner/clip', 'revision': 'aaa" in verdict
    rule = Requirement(metric="better", of="champion", at_least=1)
    assert words(config.model_copy(update={"require": (rule,)}), evaluation(0.9)) == (
        False,
        "better of champion at least 1: the champion was not measured by it",
    )


def test_a_release_without_values_cannot_be_compared(config, evaluation, tmp_path) -> None:
    folder = evaluation(0.5)
    (folder / "values.parquet").unlink()
    release(config, folder, tmp_path)
    assert words(config, evaluation(0.9)) == (
        False,
        "good of champion at least 1: koala-700m v1 (target folder) holds no values.parquet",
    )
    (tmp_path / "shared" / NAME / "v1" / "values.parquet").write_bytes(b"no table")
    assert (
        "values.parquet of koala-700m v1 (target folder) is not a table of values" in words(config, evaluation(0.9))[1]
    )


def test_no_rule_no_champion(config, evaluation, tmp_path) -> None:
    release(config, evaluation(0.5), tmp_path)
    assert champion(config.model_copy(update={"require": ()}), NAME) is None


def test_both_are_shown_side_by_side(config, evaluation, tmp_path) -> None:
    release(config, evaluation(0.5, wrong=40), tmp_path)
    challenger = evaluation(0.9, wrong=200)
    standing = champion(config, NAME)
    image = standing.beside(challenger, NAME)
    colours = {colour for _, colour in image.getcolors(image.width * image.height)}
    assert {(255, 40, 0), (255, 200, 0)} <= colours
    (challenger / "samples" / "teacher").mkdir()
    for file in (challenger / "samples").glob("*.png"):
        Image.new("RGB", (8, 8), (0, 0, 250)).save(challenger / "samples" / "teacher" / file.name)
    wider = standing.beside(challenger, NAME)
    assert wider.width > image.width
    assert (0, 0, 250) in {colour for _, colour in wider.getcolors(wider.width * wider.height)}
    (challenger / "samples" / "000003.png").rename(challenger / "samples" / "000005.png")
    assert standing.beside(challenger, NAME) is None


def test_the_gates_page_shows_each_rule_and_all_three(config, evaluation, tmp_path) -> None:
    release(config, evaluation(0.5, wrong=40), tmp_path)
    challenger = evaluation(0.3, wrong=200)
    standing = champion(config, NAME)
    images = standing.beside(challenger, NAME)
    file = tmp_path / "gate.html"
    gate_page.write(file, "<b>odd</b>", verdicts_on(challenger, config, standing), challenger, standing, images)
    text = file.read_text()
    assert "&lt;b&gt;odd&lt;/b&gt; at the gate" in text
    assert "<b>odd" not in text
    assert "does not meet every rule" in text
    assert text.count("good of champion at least 1") == 1
    assert f"<th>{NAME} v1 (target folder)</th>" in text
    assert text.count("data:image/png;base64,") == 1
    gate_page.write(file, NAME, [], challenger, None, None)
    assert "meets every rule" in file.read_text()
    assert "data:image" not in file.read_text()


def test_a_person_overrules_the_gate_by_name_for_one_evaluation(
    config, evaluation, tmp_path, tiny_teacher, recorder, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    distilled = shutil.copytree(tiny_teacher, tmp_path / "distilled" / NAME)
    release(config, evaluation(0.9), tmp_path)
    refused = evaluation(0.5)
    folders = {"distilled": distilled, "evaluation": refused, "out": tmp_path / "out"}
    with pytest.raises(KoalaError, match="is not released"):
        publish(config, **folders, run=recorder)
    assert recorder.images == [("champion", 0)]
    assert recorder.tagged["released"] == "no"

    approve(config, NAME, refused, "the old one infringes a trademark", "Ada")
    assert "Ada overrules: good of champion at least 1: 0.556" in capsys.readouterr().out
    (entry,) = yaml.safe_load(approvals.FILE.read_text())
    assert (entry["by"], entry["because"]) == ("Ada", "the old one infringes a trademark")
    approved = config.model_copy(update={"approvals": approvals.read()})
    with pytest.raises(KoalaError, match="Ada approved this evaluation of koala-700m already"):
        approve(approved, NAME, refused, "again", "Bob")
    publish(approved, **folders, run=recorder)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert (receipt["released"], receipt["approval"]["by"], receipt["rules"][0]["passed"]) == (True, "Ada", False)
    assert recorder.tagged["approved_by"] == "Ada"
    assert config.targets[0].shelf(NAME).latest() == "v2"

    # Another student wants another approval, other figures do, and a student that passes wants none.
    assert approvals.find(approved.approvals, NAME, refused)
    assert approvals.find(approved.approvals, "koala-1b", refused) is None
    with pytest.raises(KoalaError, match="is not released"):
        publish(approved, distilled, evaluation(0.4), tmp_path / "again", NoRun())
    with pytest.raises(
        KoalaError, match=r"meets every rule of publish.require: `koala publish koala-700m` releases it"
    ):
        approve(config, NAME, evaluation(0.95), "why not", None)
    with pytest.raises(KoalaError, match="was not evaluated: run `koala evaluate koala-1b` first"):
        approve(config, "koala-1b", tmp_path / "nothing", "why not", None)


def test_an_overruled_release_published_again_is_the_same_version(
    config, evaluation, tmp_path, tiny_teacher, recorder, monkeypatch
) -> None:
    """It is the champion itself by then, and misses no rule; so it is where a target failed, and the call is repeated."""
    monkeypatch.chdir(tmp_path)
    distilled = shutil.copytree(tiny_teacher, tmp_path / "distilled" / NAME)
    release(config, evaluation(0.9), tmp_path)
    refused = evaluation(0.5)
    approve(config, NAME, refused, "the old one infringes a trademark", "Ada")
    approved = config.model_copy(update={"approvals": approvals.read(), "single_file": False})
    for _ in range(2):
        publish(approved, distilled, refused, tmp_path / "out", recorder)
        receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
        assert receipt["targets"][0]["version"] == "v2"
    assert config.targets[0].shelf(NAME).versions() == ["v1", "v2"]


def test_a_rule_that_asks_for_more_than_the_champion_lets_the_same_release_be_completed(
    config, evaluation, tmp_path, tiny_teacher
) -> None:
    """Its first target has it and it stands there, a second one failed: the next call sends it to that one."""
    distilled = shutil.copytree(tiny_teacher, tmp_path / "distilled" / NAME)
    second = FolderTarget(path=tmp_path / "second")
    rule = Requirement(metric="good", of="champion", at_least=1.01)
    better = config.model_copy(update={"require": (rule,), "single_file": False})
    release(better, evaluation(0.5), tmp_path)
    challenger = evaluation(0.95)
    publish(better, distilled, challenger, tmp_path / "out", NoRun())
    both = better.model_copy(update={"targets": (*better.targets, second)})
    publish(both, distilled, challenger, tmp_path / "out", NoRun())
    assert [target.shelf(NAME).versions() for target in both.targets] == [["v1", "v2"], ["v1"]]
    # Another student that is no better is still refused.
    with pytest.raises(KoalaError, match="is not released"):
        publish(both, distilled, evaluation(0.94), tmp_path / "out", NoRun())


def test_images_of_other_prompts_are_not_shown_beside(config, evaluation, tmp_path) -> None:
    release(config, evaluation(0.5, wrong=40), tmp_path)
    assert champion(config, NAME).beside(evaluation(0.9, wrong=200), NAME)
    assert champion(config, NAME).beside(evaluation(0.9, wrong=200, first_seed=7), NAME) is None


def test_a_champion_whose_figures_cannot_be_read_is_said(config, evaluation, tmp_path) -> None:
    release(config, evaluation(0.5), tmp_path)
    file = tmp_path / "shared" / NAME / "v1" / "metrics.json"
    for text in ('{"after": {}}', "{", "[]"):
        file.write_text(text)
        passed, verdict = words(config, evaluation(0.9))
        assert not passed
        assert "metrics.json of koala-700m v1 (target folder) does not say how it was measured" in verdict


def test_a_version_is_judged_by_its_own_images_in_a_folder_that_is_used_again(config, evaluation, tmp_path) -> None:
    out = tmp_path / "judged"
    release(config, evaluation(0.5, wrong=40), tmp_path)
    first = evaluation(0.9, wrong=200)
    Image.new("RGB", (32, 32)).save(first / "samples" / "000005.png")
    release(config, first, tmp_path)
    config.targets[0].shelf(NAME).point_to("v1")
    judge_version(config, NAME, "v2", out)
    assert (out / "evaluation" / "samples" / "000005.png").is_file()
    release(config, evaluation(0.95, wrong=100), tmp_path)
    config.targets[0].shelf(NAME).point_to("v1")
    judge_version(config, NAME, "v3", out)
    assert {file.name for file in (out / "evaluation" / "samples").iterdir()} == {"000000.png", "000003.png"}
    assert (out / "beside.png").is_file()
    judge_version(config, NAME, "v1", out)
    assert not (out / "beside.png").exists()  # there is no other


def test_an_approval_is_added_behind_a_line_without_an_end(evaluation, tmp_path) -> None:
    file = tmp_path / "approvals.yaml"
    for by in ("Ada", "Bob"):
        approvals.add(NAME, evaluation(0.5), "because", by, file)
        file.write_text(file.read_text().rstrip("\n"))
    assert [each.by for each in approvals.read(file)] == ["Ada", "Bob"]


def test_an_account_without_a_name_is_asked_for_one(evaluation, tmp_path, monkeypatch) -> None:
    """As in a container that runs under a number."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654)
    with pytest.raises(KoalaError, match=r"this account has no name: say who approves \(--by\)"):
        approvals.add(NAME, evaluation(0.5), "because", None, tmp_path / "approvals.yaml")


@pytest.mark.parametrize("text", ["- {student: koala-700m}", "yes", "- [", "{a: b}"])
def test_approvals_that_are_none_are_refused(text, tmp_path) -> None:
    file = tmp_path / "approvals.yaml"
    file.write_text(text)
    with pytest.raises(KoalaError, match=r"approvals.yaml does not hold approvals: .*`koala release approve`"):
        approvals.read(file)
