"""What must never be, as tests over the imports: lazy ones and those for types included."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import networkx as nx
import pytest
import yaml

ROOT = Path(__file__).parents[1]
KOALA = sorted((ROOT / "koala").rglob("*.py"))
FLOWS = sorted((ROOT / "flows").rglob("*.py"))
PACKAGES = ("data", "teacher", "unet", "distill", "evaluate", "publish", "demo")
STAGES = {
    "source": "koala.data.source",
    "download": "koala.data.download",
    "score": "koala.data.score",
    "filter": "koala.data.filter",
    "recaption": "koala.data.recaption",
    "teacher": "koala.teacher.teacher",
    "encode": "koala.data.encode",
    "reference": "koala.evaluate.reference",
    "student": "koala.unet.student",
    "distill": "koala.distill.distill",
    "evaluate": "koala.evaluate.evaluate",
    "publish": "koala.publish.publish",
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file) for file in [*KOALA, *FLOWS]}


@cache
def imports(file: Path) -> frozenset[str]:
    """The dotted names that a file imports, anywhere in it: modules of the project, or `package.name` of others."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(str(node.module) if node.module in MODULES and full not in MODULES else full)
    return frozenset(found)


def offenders(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    """Files that import one of the names, or something within it."""
    return [
        f"{name_of(file)} imports {name}"
        for file in files
        for name in sorted(imports(file))
        if any(name == each or name.startswith(f"{each}.") for each in forbidden)
    ]


def within(*packages: str) -> list[Path]:
    return [file for file in KOALA if file.relative_to(ROOT / "koala").parts[0] in packages]


def test_1_no_circle_of_files() -> None:
    graph = nx.DiGraph((name_of(file), name) for file in [*KOALA, *FLOWS] for name in imports(file) if name in MODULES)
    assert list(nx.simple_cycles(graph)) == []


def test_2_stages_know_nothing_of_what_runs_them() -> None:
    above = ("koala.params", "koala.runner", "koala.cli", "koala.commands", "koala.tracking", "koala.provenance")
    assert offenders(within(*PACKAGES), above) == []


@pytest.mark.parametrize("word", [r"artifacts/", r"(?<!/)\bruns/", r"dvc\.yaml", r"""["'](artifacts|runs)["']"""])
def test_3_only_the_runner_and_flows_know_the_folders(word: str) -> None:
    """In code, comments, docstrings and help texts. (An address of MLflow's UI has `/runs/` in it.)"""
    files = [file for file in KOALA if file.name != "runner.py"]
    assert [name_of(file) for file in files if re.search(word, file.read_text())] == []


def test_4_only_the_list_of_kinds_and_the_command_know_the_demo_and_the_benchmarks() -> None:
    for package, known_by in {
        "koala.demo": {"koala.params", "koala.cli"},
        "koala.bench": {"koala.commands.bench"},
    }.items():
        names = {file: name_of(file) for file in [*KOALA, *FLOWS]}
        assert package in names.values()
        others = [
            file for file, name in names.items() if name not in known_by and not f"{name}.".startswith(f"{package}.")
        ]
        assert offenders(others, (package,)) == []


def test_5_configuration_is_light() -> None:
    files = [file for file in KOALA if file.name == "config.py"]
    heavy = ("torch", "diffusers", "transformers", "pyarrow")
    assert len(files) > 5
    assert offenders(files, heavy) == []
    # Nor does what they import: all of params.yaml is read before anything heavy.
    modules = ", ".join([*map(name_of, files), "koala.params", "koala.runner"])
    code = f"import sys, {modules}; sys.stderr.write(repr([name for name in {heavy} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "[]")


@pytest.mark.parametrize("stage", STAGES)
def test_6_a_stage_takes_its_configuration_the_nouns_of_its_deps_out_and_run(stage: str) -> None:
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(declared) == set(STAGES)
    deps = declared[stage].get("do", declared[stage])["deps"]
    nouns = {dep.split("/")[2] for dep in deps if dep.startswith("artifacts/")}
    parameters = list(inspect.signature(getattr(import_module(STAGES[stage]), stage)).parameters)
    assert (parameters[0], parameters[-2:]) == ("config", ["out", "run"])
    assert set(parameters[1:-2]) == nouns


TOYS = {
    "rule": (
        "koala/data/rules/shouting.py",
        """
from typing import Literal
from koala.data.rules.base import Rule

class Shouting(Rule):
    kind: Literal["shouting"] = "shouting"

    def measure(self, sample, view):
        return {"capitals": sum(map(str.isupper, sample.caption)) / len(sample.caption)}

    def bounds(self):
        return {"capitals": (None, 0.5)}
""",
        (
            "    Words\n    | Characters",
            "    Shouting\n    | Words\n    | Characters",
            "from koala.data.rules.shouting import Shouting",
        ),
        """
params["profiles"]["smoke"]["filter"]["rules"] = {"shouting": {}}
from koala.data.filter import filter
from koala.data.shards import Sample, ShardWriter
from PIL import Image
import io
Path("images").mkdir(); Path("kept").mkdir()
with ShardWriter(Path("images"), 10) as writer:
    for key, caption in (("000000000", "a quiet fox"), ("000000001", "A LOUD FOX")):
        picture = io.BytesIO(); Image.new("RGB", (32, 32), (int(key), 0, 0)).save(picture, "PNG")
        writer.write(Sample(key, picture.getvalue(), "png", caption, {}))
filter(load(params).config("filter"), images=Path("images"), scores=Path("scores"), out=Path("kept"), run=NoRun())
report = json.loads(Path("kept/report.json").read_text())
assert report["kept"] == 1 and report["dropped"] == {"shouting": 1}, report
""",
    ),
    "metric": (
        "koala/evaluate/metrics/brightness.py",
        """
from typing import ClassVar, Literal
from koala.evaluate.metrics.base import Column, Metric

class Brightness(Metric):
    kind: Literal["brightness"] = "brightness"
    columns: ClassVar = {"brightness": Column("brightness", "{:.1f}")}

    def measure(self, images, prompts, reference):
        return {"brightness": [image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in images]}
""",
        (
            "    Attributes | BVqa",
            "    Brightness | Attributes | BVqa",
            "from koala.evaluate.metrics.brightness import Brightness",
        ),
        """
smoke = params["profiles"]["smoke"]
smoke["evaluate"] |= {"metrics": {"brightness": {}}, "count": 2, "grid_rows": 1}
smoke["publish"]["require"] = [{"metric": "brightness", "at_least": 1}]
params["machines"]["cpu"]["evaluate"] = {"latency_repeats": 1}
from koala.evaluate.evaluate import evaluate
from koala.evaluate.reference import reference
config = load(params).config("evaluate")
Path("reference").mkdir(); Path("koala-700m").mkdir()
reference(config, teacher=teacher, out=Path("reference"), run=NoRun())
evaluate(config, teacher, teacher, teacher, Path("reference"), out=Path("koala-700m"), run=NoRun())
found = json.loads(Path("koala-700m/metrics.json").read_text())
assert all(0 < found[model]["brightness"] < 255 for model in ("teacher", "before", "after")), found
assert "| brightness |" in Path("koala-700m/summary.md").read_text()
""",
    ),
    "target": (
        "koala/publish/targets/note.py",
        """
from pathlib import Path
from typing import Literal
from koala.publish.targets.base import Target

class NoteTarget(Target):
    kind: Literal["note"] = "note"
    file: str

    def send(self, release, name, stands=True):
        Path(self.file).write_text(name)
        return {"file": self.file}
""",
        (
            "Target = Annotated[FolderTarget | HubTarget",
            "Target = Annotated[NoteTarget | FolderTarget | HubTarget",
            "from koala.publish.targets.note import NoteTarget",
        ),
        """
rules = [{"metric": "unet_parameters", "at_most": 1}]
params["profiles"]["smoke"]["publish"] |= {"targets": {"note": {"file": "sent"}}, "require": rules}
from koala.publish.publish import publish
evaluation = Path("evaluation"); (evaluation / "plots").mkdir(parents=True); Path("release").mkdir()
measured = {"unet_parameters": 1, "step_ms": 1.0}
metrics = {"teacher": measured, "before": measured, "after": measured, "size_of_teacher": 1.0, "speed_up": 1.0}
(evaluation / "metrics.json").write_text(json.dumps(metrics))
(evaluation / "samples").mkdir()
for name in ("report.html", "values.parquet"):
    (evaluation / name).touch()
(evaluation / "summary.md").write_text("| model |")
(evaluation / "plots/grid.png").write_bytes(b"png")
publish(load(params).config("publish"), distilled=teacher, evaluation=evaluation, out=Path("release"), run=NoRun())
assert Path("sent").read_text() == teacher.name
assert json.loads(Path("release/receipt.json").read_text())["targets"] == [{"kind": "note", "file": "sent"}]
""",
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kind", TOYS)
def test_7_a_new_kind_is_one_file_and_one_line_of_a_union(kind: str, tmp_path: Path, tiny_teacher: Path) -> None:
    """params.yaml names it, its stage applies it, and the schema has it. (The line of the union has its import.)"""
    file, code, (line, changed, imported), use = TOYS[kind]
    code_class = imported.rpartition(" ")[2]
    shutil.copytree(ROOT / "koala", tmp_path / "koala", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    (tmp_path / file).write_text(code)
    union = (tmp_path / "koala/params.py").read_text()
    assert union.count(line) == 1
    (tmp_path / "koala/params.py").write_text(
        union.replace(line, changed).replace("import os\n", f"import os\n{imported}\n", 1)
    )
    script = f"""
import json, sys, yaml
for name in [name for name in sys.modules if name.partition(".")[0] == "koala"]:
    del sys.modules[name]  # of the process that this one is forked from
from pathlib import Path
from koala import params as parameters
from koala.run import NoRun
assert parameters.__file__.startswith({str(tmp_path)!r})
teacher = Path({str(tiny_teacher)!r})
params = yaml.safe_load(Path({str(ROOT / "params.yaml")!r}).read_text())
def load(values):
    Path("params.yaml").write_text(yaml.safe_dump(values))
    return parameters.load(profile="smoke")
{use}
assert {code_class!r} in parameters.schema()["$defs"]
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_8_only_the_console_writes_to_stdout() -> None:
    """What a command gives goes by koala.console.show, or by a rich console of a command's own."""
    writes = r"(?<!\.)\bprint\(|\becho\(|sys\.__?stdout|sys\.stdout|os\.write\(1\b"
    files = [file for file in [*KOALA, *FLOWS] if name_of(file) != "koala.console"]
    assert [name_of(file) for file in files if re.search(writes, file.read_text())] == []
    to_stdout = r"\bConsole\((?!.*stderr=True)"
    assert {name_of(file) for file in KOALA + FLOWS if re.search(to_stdout, file.read_text())} == {
        "koala.console",
        "koala.data.explain",
        "koala.inspect",
    }


def test_8_ruff_forbids_print_everywhere() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "T20" in lint["select"]
    exempt = [*lint["ignore"], *(rule for rules in lint["per-file-ignores"].values() for rule in rules)]
    assert not [rule for rule in exempt if rule.startswith("T")]
    assert [name_of(file) for file in [*KOALA, *FLOWS] if re.search(r"noqa(: *T2|\s*$)", file.read_text(), re.M)] == []


def test_koala_never_imports_prefect() -> None:
    assert offenders(KOALA, ("prefect", "flows")) == []


def test_flows_import_only_prefect_dvc_and_what_reports() -> None:
    allowed = ("flows", "prefect", "dvc", "networkx", "psutil", "yaml", "koala")
    foreign = {
        name for file in FLOWS for name in imports(file) if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert {name for name in foreign if name.partition(".")[0] not in allowed} == set()
    known = ("koala.causes", "koala.tracking", "koala.process", "koala.console", "koala.provenance", "koala.errors")
    assert {name for name in foreign if name.startswith("koala.") and name not in known} == set()
