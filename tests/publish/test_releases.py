"""`koala release`: what stands at the targets, whether it is whole, and going back to an earlier version."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from koala.errors import KoalaError
from koala.publish.releases import roll_back, show_releases, verify
from koala.publish.targets.base import Target
from koala.publish.targets.folder import FolderTarget


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


def test_all_versions_are_shown_with_the_latest(target: FolderTarget, capsys: pytest.CaptureFixture[str]) -> None:
    show_releases([target], ["koala-700m", "koala-1b"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["koala-700m", "folder", "v1", "1", "0.0"],
        ["koala-700m", "folder", "v2", "1", "0.0", "latest"],
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

        def send(self, release: Path, name: str) -> dict[str, str]:
            return {}

    with pytest.raises(KoalaError, match=r"no target keeps versions: name one under publish.targets"):
        roll_back([Remember()], "koala-700m", "v1")


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
    refused = koala("verify", "panda")
    assert refused.returncode == 2
    assert refused.stderr.startswith("koala: no student 'panda'")
