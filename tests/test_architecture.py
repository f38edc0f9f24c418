"""flows/ knows Prefect and DVC, koala/ knows the work: neither imports the other's."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it: `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", sorted((ROOT / "koala").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_koala_never_imports_prefect(file: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(file)}
    assert not roots & {"prefect", "flows"}


@pytest.mark.parametrize("file", sorted((ROOT / "flows").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_flows_imports_only_prefect_dvc_and_tracking(file: Path) -> None:
    names = set(imports(file))
    foreign = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    allowed = ("flows.", "prefect.", "dvc.", "networkx", "psutil", "koala.tracking")
    assert {name for name in foreign if not name.startswith(allowed)} == set()
