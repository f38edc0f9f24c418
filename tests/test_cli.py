"""The command as a user meets it: errors are one line and status 2, help is quick."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def koala(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("koala"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("koala: ")
    return line


def test_help_imports_nothing_heavy() -> None:
    heavy = "('torch', 'mlflow', 'pandas', 'yaml', 'pydantic')"
    code = f"import sys; import koala.cli; print(*(name for name in {heavy} if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
    assert "distill" in koala("--help").stdout


def test_unknown_student(workspace: Path) -> None:
    assert one_line(koala("distill", "koala-2b")).endswith("choose one of koala-1b, koala-700m")


def test_missing_stage_output(workspace: Path) -> None:
    assert "artifacts/smoke/table is missing: run `dvc repro source`" in one_line(koala("download"))


def test_a_sample_that_nothing_knows(workspace: Path) -> None:
    assert "no artifact of this profile knows '000000007'" in one_line(koala("data", "explain", "000000007"))


def test_outside_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run koala in the project's folder" in one_line(koala("source"))


@pytest.mark.usefixtures("forked")
def test_a_machine_joins_from_a_checkout(workspace: Path) -> None:
    assert "run this in the checkout" in one_line(koala("worker", "join", "--pool", "gpu"))
    (workspace / "flows").symlink_to(ROOT / "flows")
    nowhere = ["--server", "http://127.0.0.1:9/api", "--folder", "machine"]
    joined = koala("worker", "join", "--pool", "gpu", "--check", *nowhere)
    assert joined.returncode == 2
    assert "join: server: FAILED: http://127.0.0.1:9/api does not answer" in joined.stderr


@pytest.fixture
def small_disk(workspace: Path) -> Iterator[Path]:
    """artifacts/ on a real file system of 64 kB, nearly full."""
    disk = Path("artifacts")
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    (disk / "full").write_bytes(b"0" * 60_000)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("runs", ["on the full disk", "on another"])
def test_a_full_disk_is_said_in_one_line(small_disk: Path, runs: str) -> None:
    """Also where the artifact is copied to it, which Python reports in a way of its own."""
    if runs == "on the full disk":
        Path("runs").symlink_to(small_disk)
    result = koala("source")
    line = result.stderr.splitlines()[-1]  # before it, in the second case, the stage's own news
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert line.startswith("koala: the disk is full")
    assert "finished work is kept" in line


def test_sdxl_without_a_gpu_stops_at_once(workspace: Path) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("profile: smoke", "profile: sdxl"))
    line = one_line(koala("source", CUDA_VISIBLE_DEVICES=""))
    assert "CUDA GPU" in line
    assert "profile: demo" in line


def test_help_fits_a_terminal_and_groups_the_commands() -> None:
    """Each command is said in one sentence, on one line of 80 columns."""
    shown = koala("--help", COLUMNS="80", TERM="dumb").stdout
    assert "..." not in shown.replace("[ARGS]...", "")
    assert "…" not in shown
    stages, tools = shown.index("Stages"), shown.index("Tools")
    assert stages < shown.index(" distill ") < tools < shown.index(" generate ")
    lines = [line for line in shown.splitlines() if line.startswith(("│", "|"))]
    names = {line.split()[1] for line in lines}
    assert len(names) == len(lines) >= 16
    assert all(line.rstrip("│| ").endswith(".") for line in lines)
    assert {"source", "reference", "publish", "inspect", "params", "bench"} <= names


def test_help_of_every_command_is_whole() -> None:
    """80 columns cut no sentence of any command's help, and a usage line says a name once."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from koala.cli import app

    def commands(group: Any, *path: str) -> Iterator[tuple[str, ...]]:
        yield path
        for name, command in getattr(group, "commands", {}).items():
            yield from commands(command, *path, name)

    found = list(commands(get_command(app)))
    assert len(found) >= 18
    for path in found:
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).stdout
        usage, _, rest = shown.strip().partition("\n")
        assert usage.startswith("Usage: "), path
        assert "]...]..." not in usage, path
        assert "…" not in shown, path
        # A count that goes on is no cut sentence.
        assert "..." not in rest.replace("1, 2, ... help", "").replace("COMMAND [ARGS]...", "").replace(
            "models...", ""
        ), path
        assert max(map(len, shown.splitlines())) <= 80, path


@pytest.mark.usefixtures("forked")
def test_params_are_checked_and_their_schema_is_shown(workspace: Path) -> None:
    assert koala("params").stdout.startswith("params.yaml is valid: profile smoke, machine cpu, koala-1b, koala-700m")
    assert json.loads(koala("params", "--schema").stdout)["title"] == "Document"
    Path("params.yaml").write_text("profile: 3")
    assert "params.yaml: profile: input should be a valid string" in one_line(koala("params"))


@pytest.mark.usefixtures("forked")
def test_generate_writes_a_grid(workspace: Path, tiny_teacher: Path) -> None:
    from PIL import Image

    result = koala("generate", str(tiny_teacher), "a large red circle", "--seed", "1", "-n", "3", "--steps", "2")
    assert result.returncode == 0, result.stderr
    assert Image.open("generated.png").size == (3 * 102 + 6, 102 + 6)
