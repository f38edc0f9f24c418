"""`koala release`: what stands at the targets, whether it is whole, and going back to an earlier version."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from koala.errors import KoalaError
from koala.publish.releases import roll_back, show_difference, show_release, show_releases, verify
from koala.publish.targets.base import Target
from koala.publish.targets.folder import FolderTarget
from koala.publish.versions import Manifest


@pytest.fixture
def target(tmp_path: Path) -> FolderTarget:
    """A target with two versions of koala-700m."""
    target = FolderTarget(path=tmp_path / "shared")
    release = tmp_path / "release"
    release.mkdir()
    for text in ("of the first", "of the second"):
        (release / "README.md").write_text(text)
        target.send(release, "koala-700m")
    return target


def latest(target: FolderTarget) -> str:
    return json.loads((target.path / "koala-700m" / "latest.json").read_text())["version"]


def content(target: Target, version: str) -> str:
    return target.shelf("koala-700m").manifest(version).sha256[:8]


def test_all_versions_are_shown_with_the_latest(target: FolderTarget, capsys: pytest.CaptureFixture[str]) -> None:
    show_releases([target], ["koala-700m", "koala-1b"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["koala-700m", "folder", "v1", "1", "0.0", content(target, "v1")],
        ["koala-700m", "folder", "v2", "1", "0.0", content(target, "v2"), "latest"],
    ]
    show_releases([target], ["koala-1b"])
    assert "no release of koala-1b yet" in capsys.readouterr().out


def test_a_rollback_moves_the_pointer_and_deletes_nothing(target: FolderTarget) -> None:
    roll_back([target], "koala-700m", "v1")
    assert latest(target) == "v1"
    assert (target.path / "koala-700m" / "v2" / "README.md").is_file()
    roll_back([target], "koala-700m", "v2")
    assert latest(target) == "v2"


def test_a_rollback_to_a_damaged_or_unknown_version_changes_no_target(target: FolderTarget, tmp_path: Path) -> None:
    whole = FolderTarget(path=tmp_path / "other")
    for text in ("of the first", "of the second"):
        (tmp_path / "release" / "README.md").write_text(text)
        whole.send(tmp_path / "release", "koala-700m")
    (target.path / "koala-700m" / "v1" / "README.md").write_text("spoilt")
    with pytest.raises(KoalaError, match=r"target folder: v1 lacks README.md as its manifest has it"):
        roll_back([whole, target], "koala-700m", "v1")
    with pytest.raises(KoalaError, match=r"koala-700m has no version 'v9': choose one of v1, v2"):
        roll_back([whole, target], "koala-700m", "v9")
    assert (latest(whole), latest(target)) == ("v2", "v2")


def test_a_version_whose_upload_broke_is_said(target: FolderTarget, capsys: pytest.CaptureFixture[str]) -> None:
    (target.path / "koala-700m" / "v1" / "README.md").unlink()
    show_releases([target], ["koala-700m"])
    assert capsys.readouterr().out.splitlines()[2].endswith("broken: 1 files missing")


def test_a_rollback_takes_the_same_release_whatever_its_version(target: FolderTarget, tmp_path: Path) -> None:
    """The other target lacks the first release, so that its v1 is what v2 is here."""
    other = FolderTarget(path=tmp_path / "other")
    other.send(tmp_path / "release", "koala-700m")
    (tmp_path / "release" / "README.md").write_text("of the third")
    for each in (target, other):
        each.send(tmp_path / "release", "koala-700m")
    other = other.model_copy(update={"kind": "another"})
    roll_back([target, other], "koala-700m", "v2")
    assert (latest(target), latest(other)) == ("v2", "v1")
    with pytest.raises(KoalaError, match=r"target another does not hold koala-700m v1 of target folder"):
        roll_back([target, other], "koala-700m", "v1")
    assert (latest(target), latest(other)) == ("v2", "v1")


def published(folder: Path, target: FolderTarget, after: float, **recipe: object) -> None:
    """Send a release that has a card, figures, verdicts and provenance."""
    folder.mkdir(exist_ok=True)
    metrics = {
        "teacher": {"attributes/all": 0.95},
        "after": {"attributes/all": after, "unet_parameters": 2776836},
        "speed_up": 2.3,
        "intervals": {"after": {"attributes/all": [after - 0.04, after + 0.04]}},
        "categories": [],
    }
    rules = [
        {"metric": "attributes/all", "of": "teacher", "at_least": 0.9, "value": 0.947, "bound": 0.911, "passed": True}
    ]
    training = {"commit": "abc", "run_id": "r1", "profile": "smoke", "config": recipe, "inputs": {}}
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: owner/base\n---\n# A card\n")
    for name, values in (
        ("metrics.json", metrics),
        ("gate.json", {"rules": rules, "approval": None}),
        ("training.json", training),
    ):
        (folder / name).write_text(json.dumps(values))
    target.send(folder, "koala-700m")


def test_a_version_is_shown_with_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [FolderTarget(path=tmp_path / "one"), FolderTarget(path=tmp_path / "two")]
    for target in targets:
        published(tmp_path / "release", target, 0.9, steps=6)
    published(tmp_path / "release", targets[0], 0.92, steps=8)
    targets[1] = targets[1].model_copy(update={"kind": "another"})
    show_release(targets, "koala-700m", "v1")
    out = capsys.readouterr().out
    for line in (
        r"koala-700m v1",
        r"licence +mit",
        r"base model +owner/base",
        r"commit +abc",
        r"MLflow run +r1",
        r"target folder +v1",
        r"target another +v1 \(latest\)",
        r"attributes/all +0.9000 +\(0.8600 to 0.9400\)",
        r"unet_parameters +2,776,836",
        r"speed_up +2.3000",
        r"attributes/all of teacher at least 0.9 +0.9110 +passed",
        r"training.json +\d+ +[0-9a-f]{12}",
    ):
        assert re.search(f"^{line}$", out, re.M), line
    show_release(targets, "koala-700m", None)
    out = capsys.readouterr().out
    assert re.search(r"^target folder +v2 \(latest\)$", out, re.M)
    assert re.search(r"^target another +not there$", out, re.M)
    with pytest.raises(KoalaError, match="has no version 'v9': choose one of v1, v2"):
        show_release(targets, "koala-700m", "v9")


def test_a_difference_of_versions_that_are_not_there_shows_nothing(
    target: FolderTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KoalaError, match="has no version 'v9': choose one of v1, v2"):
        show_difference([target], "koala-700m", "v1", "v9")
    assert capsys.readouterr().out == ""


def test_a_difference_names_figures_recipe_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = FolderTarget(path=tmp_path / "one")
    published(tmp_path / "release", target, 0.9, steps=6, weights={"feature": 1, "task": 1})
    (tmp_path / "release" / "report.html").write_text("<p>")
    published(tmp_path / "release", target, 0.92, steps=6, weights={"feature": 2, "task": 1})
    show_difference([target], "koala-700m", "v1", "v2")
    out = capsys.readouterr().out
    assert re.search(r"^attributes/all +0.9000 \(0.8600 to 0.9400\) +0.9200 \(0.8800 to 0.9600\)$", out, re.M)
    assert re.search(r"^weights.feature +1 +2$", out, re.M)
    assert re.search(r"^report.html +- +3$", out, re.M)
    assert re.search(r"^metrics.json +\d+ +\d+$", out, re.M)
    assert "steps" not in out
    assert "README.md" not in out
    show_difference([target], "koala-700m", "v1", "v1")
    assert "the same recipe\n\nthe same files\n" in capsys.readouterr().out


def test_damage_is_found(target: FolderTarget, capsys: pytest.CaptureFixture[str]) -> None:
    verify([target], "koala-700m", None)
    assert "koala-700m v2 at target folder is whole" in capsys.readouterr().out
    (target.path / "koala-700m" / "v2" / "README.md").unlink()
    with pytest.raises(KoalaError, match=r"v2 lacks README.md"):
        verify([target], "koala-700m", None)
    verify([target], "koala-700m", "v1")
    with pytest.raises(KoalaError, match="target folder holds no release of koala-1b: publish one"):
        verify([target], "koala-1b", None)


def test_a_target_without_versions_is_said() -> None:
    class Remember(Target):
        kind: str = "remember"

        def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
            return {}

    with pytest.raises(KoalaError, match=r"no target keeps versions: name one under publish.targets"):
        roll_back([Remember()], "koala-700m", "v1")


@pytest.mark.usefixtures("forked")
def test_the_commands_take_the_targets_of_the_profile(
    target: FolderTarget, workspace: Path, change_params: Callable[..., None]
) -> None:
    change_params(publish={"targets": {"folder": {"path": str(target.path)}}})

    def koala(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("koala"), "release", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert koala("rollback", "koala-700m", "v1").returncode == 0
    assert latest(target) == "v1"
    assert "latest" in koala("list").stdout
    assert koala("verify", "koala-700m").stdout == "koala-700m v1 at target folder is whole\n"
    assert "target folder  v1 (latest)" in koala("show", "koala-700m").stdout
    assert "README.md" in koala("diff", "koala-700m", "v1", "v2").stdout
    refused = koala("verify", "panda")
    assert refused.returncode == 2
    assert refused.stderr.startswith("koala: no student 'panda'")


def test_of_candidates_none_stands_until_one_is_promoted(
    target: FolderTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.send(tmp_path / "release", "koala-1b", stands=False)
    show_releases([target], ["koala-1b"])
    assert "latest" not in capsys.readouterr().out
    for ask in (show_release, verify):
        with pytest.raises(
            KoalaError, match=r"no release of koala-1b stands at target folder: name a candidate \(v1\)"
        ):
            ask([target], "koala-1b", None)
    roll_back([target], "koala-1b", "v1")
    assert "the latest koala-1b is v1\n" in capsys.readouterr().err
    verify([target], "koala-1b", None)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "unet/../../outside", "./unet", "", "."])
def test_a_manifest_names_no_file_outside_of_its_release(name: str) -> None:
    """It comes from a target, and files are written by its names."""
    text = json.dumps({"unet/model.safetensors": {"size": 1, "sha256": "0"}, name: {"size": 1, "sha256": "0"}})
    with pytest.raises(KoalaError, match="outside of the release"):
        Manifest.read(text, "s3://shelf/manifest.json")
