"""The command as a user meets it: errors are one line and status 2, help is quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KOALA = Path(sys.executable).with_name("koala")


def koala(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KOALA, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


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


def test_outside_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run koala in the project's folder" in one_line(koala("source"))


def test_a_full_disk_is_said_in_one_line(workspace: Path) -> None:
    """A real file system of a megabyte, as the artifacts' folder."""
    Path("artifacts").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "artifacts"], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        Path("runs").symlink_to("artifacts")
        Path("artifacts/full").write_bytes(b"0" * 60_000)
        line = one_line(koala("source"))
        assert "disk is full" in line
        assert "finished work is kept" in line
    finally:
        subprocess.run(["umount", "artifacts"], check=True)


def test_sdxl_without_a_gpu_stops_at_once(workspace: Path) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("profile: smoke", "profile: sdxl"))
    line = one_line(koala("source", CUDA_VISIBLE_DEVICES=""))
    assert "CUDA GPU" in line
    assert "profile: demo" in line


def test_help_fits_a_terminal_and_groups_the_commands() -> None:
    """Each command is said in a sentence that 80 columns do not cut."""
    shown = koala("--help", COLUMNS="80", TERM="dumb").stdout
    assert "..." not in shown.replace("[ARGS]...", "")
    assert "…" not in shown
    stages, tools = shown.index("Stages"), shown.index("Tools")
    assert stages < shown.index(" distill ") < tools < shown.index(" generate ")
    lines = [line for line in shown.splitlines() if line.startswith(("│", "|"))]
    names = {line.split()[1] for line in lines}
    assert {"source", "reference", "publish", "inspect", "params", "bench"} <= names


def test_params_are_checked_and_their_schema_is_shown(workspace: Path) -> None:
    assert koala("params").stdout.startswith("params.yaml is valid: profile smoke, machine cpu, koala-1b, koala-700m")
    assert json.loads(koala("params", "--schema").stdout)["title"] == "Document"
    Path("params.yaml").write_text("profile: 3")
    assert "params.yaml: profile: input should be a valid string" in one_line(koala("params"))


def test_generate_writes_a_grid(workspace: Path, tiny_teacher: Path) -> None:
    from PIL import Image

    result = koala("generate", str(tiny_teacher), "a large red circle", "--seed", "1", "-n", "3", "--steps", "2")
    assert result.returncode == 0, result.stderr
    assert Image.open("generated.png").size == (3 * 102 + 6, 102 + 6)
