"""The command `koala generate`: which models it takes, and what it lays out."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from koala import sheet
from koala.cli import _lora, _model
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.sheet import Request, generate_sheet
from koala.teacher.config import LoraPart

SAMPLING = SamplingConfig(steps=2, guidance=2.0)


def request(count: int = 1, **others: object) -> Request:
    return Request("a large red circle", 1, count, SAMPLING, **others)


def test_one_model_and_several(tiny_teacher: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "new" / "one.png", tmp_path / "two.png"
    generate_sheet([str(tiny_teacher)], request(3), one)
    assert Image.open(one).size == (3 * 102 + 6, 102 + 6)
    generate_sheet([str(tiny_teacher), f"{tiny_teacher}/"], request(2), two)
    assert Image.open(two).width == 190 + 2 * 102 + 6


def test_each_image_of_a_sheet_has_the_next_seed(tiny_teacher: Path, tmp_path: Path) -> None:
    def sheet_of(request: Request) -> list[Image.Image]:
        generate_sheet([str(tiny_teacher)], request, tmp_path / "x.png", dtype="float32")
        sheet = Image.open(tmp_path / "x.png").convert("RGB")
        return [sheet.crop((x, 0, x + 102, sheet.height)) for x in range(0, sheet.width - 6, 102)]

    one, two = sheet_of(request(2))
    (alone,) = sheet_of(Request("a large red circle", 2, 1, SAMPLING))
    assert one != two
    assert two == alone


def test_a_missing_model_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.sheet import Request, generate_sheet
from pathlib import Path
try:
    generate_sheet(["nowhere"], Request("x", 0, 1, SamplingConfig()), Path("x.png"))
except KoalaError as error:
    heavy = [name for name in ("torch", "diffusers", "transformers", "numpy", "PIL") if name in sys.modules]
    print(error, heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.startswith("there is no model at nowhere")
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize("name", ["image", "image.pnj"])
def test_a_file_that_is_no_image_is_said_before_a_model_is_loaded(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sheet, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(KoalaError, match=rf"--out .*/{name}: name a file of one of .png, .jpg"):
        generate_sheet([str(tiny_teacher)], request(), tmp_path / name)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"models": ["/nowhere/at/all"]}, "there is no folder /nowhere/at/all"),
        ({"base": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"loras": [LoraPart(file=Path("nowhere.safetensors"))]}, "there is no LoRA at nowhere.safetensors"),
        ({"dtype": "half"}, "--dtype half: choose one of float32, float16, bfloat16"),
    ],
)
def test_all_is_looked_for_before_a_model_is_loaded(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict, line: str
) -> None:
    monkeypatch.setattr(sheet, "load", lambda *_: pytest.fail("a model was loaded"))
    models = [str(tiny_teacher), *more.pop("models", [])]
    with pytest.raises(KoalaError, match=line):
        generate_sheet(models, request(), tmp_path / "x.png", **more)


def test_a_size_that_the_vae_cannot_make_is_one_line(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(KoalaError, match="must be multiples of 4 px: 33 is none"):
        generate_sheet([str(tiny_teacher)], request(size=(32, 33)), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("a/b.safetensors", "a/b.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("c:/a.safetensors", "c:/a.safetensors", 1.0),
        ("a.safetensors:-1", "a.safetensors", -1.0),
    ],
)
def test_a_lora_has_a_weight(text: str, file: str, weight: float) -> None:
    assert _lora(text) == LoraPart(file=Path(file), weight=weight)


def test_a_lora_that_is_a_pickle_is_refused() -> None:
    with pytest.raises(KoalaError, match=r"--lora a\.pt:2: .*safetensors"):
        _lora("a.pt:2")


def test_a_students_name_is_that_of_its_release(workspace: Path, change_params: Callable[..., None]) -> None:
    change_params(publish={"targets": {"folder": {"path": "releases"}}})
    with pytest.raises(
        KoalaError, match=r"koala-700m has no release that stands in a folder: publish one \(`koala publish"
    ):
        _model("koala-700m")
    for version in ("v1", "v2"):
        (workspace / "releases/koala-700m" / version).mkdir(parents=True)
        (workspace / "releases/koala-700m" / version / "manifest.json").write_text("{}")
    (workspace / "releases/koala-700m/latest.json").write_text('{"version": "v2", "manifest_sha256": "0"}')
    assert _model("koala-700m") == "releases/koala-700m/v2"
    assert _model("koala-700m@v1") == "releases/koala-700m/v1"
    with pytest.raises(KoalaError, match="koala-700m has no release v7 in a folder: choose one of v1, v2"):
        _model("koala-700m@v7")
    for other in ("panda", "owner/koala-700m", "x.safetensors"):
        assert _model(other) == other
    (workspace / "koala-1b").mkdir()
    assert _model("koala-1b") == "koala-1b"  # a folder of that name comes first


def test_without_params_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _model("koala-700m") == "koala-700m"
