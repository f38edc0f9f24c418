"""dvc.yaml against the code: every module that decides what a stage gives is among its deps."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What runs each stage's command; `distill` runs its loop in processes of its own.
ENTRY = {
    "source": ["koala/data/source.py"],
    "download": ["koala/data/download.py", "koala/demo/server.py"],
    "filter": ["koala/data/filter.py"],
    "teacher": ["koala/teacher.py"],
    "encode": ["koala/data/encode.py"],
    "student": ["koala/unet/build.py"],
    "distill": ["koala/distill/launch.py", "koala/distill/loop.py"],
    "evaluate": ["koala/evaluate/stage.py"],
    "publish": ["koala/publish/stage.py"],
}
# Housekeeping: it loads, shows, tracks and names, and decides nothing of what a stage gives. Values of configuration types
# are parameters. The validation grid is for people's eyes.
HOUSEKEEPING = {
    "koala/__init__.py",
    "koala/config.py",
    "koala/console.py",
    "koala/errors.py",
    "koala/grid.py",
    "koala/provenance.py",
    "koala/section.py",
    "koala/tracking.py",
    "koala/work.py",
}


def imports(file: str) -> set[str]:
    """The project's modules that a file imports, anywhere in it, but for types alone."""
    found = set()
    tree = ast.parse((ROOT / file).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("koala"):
            continue
        for name in node.names:
            for path in (f"{node.module}.{name.name}", node.module):
                file = str(path).replace(".", "/") + ".py"
                if (ROOT / file).is_file():
                    found.add(file)
                    break
    return found


def reached(files: list[str]) -> set[str]:
    seen: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in seen and file not in HOUSEKEEPING and not file.endswith(("/config.py", "/__init__.py")):
            seen.add(file)
            waiting += imports(file)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_the_imports(stage: str) -> None:
    deps = STAGES[stage].get("do", STAGES[stage])["deps"]
    code = [dep for dep in deps if dep.startswith("koala/")]
    for file in reached(ENTRY[stage]):
        assert any(file == dep or file.startswith(f"{dep}/") for dep in code), f"{stage} lacks {file} in dvc.yaml"


def test_deps_exist() -> None:
    for stage in STAGES.values():
        for dep in stage.get("do", stage)["deps"]:
            assert dep.startswith("artifacts/") or (ROOT / dep).exists(), dep
