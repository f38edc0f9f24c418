"""The gate, the card, and a release that generates what the student generated."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from koala import generate
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.evaluate.prompts import Prompt
from koala.evaluate.values import Values
from koala.publish.config import PublishConfig
from koala.publish.gate import Requirement, judge
from koala.publish.publish import publish
from koala.publish.targets.base import Target
from koala.publish.targets.folder import FolderTarget
from koala.publish.versions import Manifest
from koala.publish.workflow import workflow
from koala.run import STATE, NoRun
from koala.teacher.embedded import unpack

METRICS = {
    "teacher": {"unet_parameters": 1000, "attributes/all": 0.95},
    "before": {"unet_parameters": 310, "attributes/all": 0.1},
    "after": {"unet_parameters": 310, "attributes/all": 0.9},
    "size_of_teacher": 0.31,
    "speed_up": 2.3,
    "share_of_teacher/attributes/all": 0.947,
    "intervals": {"after": {"attributes/all": [0.861, 0.939]}, "share_of_teacher/attributes/all": [0.904, 0.991]},
    "bounds": {"attributes/all": [0.868, 0.932], "share_of_teacher/attributes/all": [0.911, 0.983]},
    "pinned": {"steps": 20, "sampler": "EulerDiscreteScheduler"},
}
PROVENANCE = {
    "stage": "distill",
    "student": "koala-700m",
    "profile": "smoke",
    "commit": "abc",
    "run_id": "r1",
    "config": {"steps": 6, "batch_size": 8, "learning_rate": 5e-4},
    "inputs": {"latents": "123"},
}
CONFIG = PublishConfig(
    license="apache-2.0",
    require=(
        Requirement(metric="attributes/all", at_least=0.8),
        Requirement(metric="attributes/all", of="teacher", at_least=0.9),
        Requirement(metric="unet_parameters", at_most=500),
    ),
    sampling=SamplingConfig(steps=20, guidance=3.0, prompts=("a large red circle", "another")),
    promote="automatic",
)


@pytest.fixture
def folders(tmp_path: Path, tiny_teacher: Path) -> dict[str, Path]:
    """A distilled pipeline (the tiny teacher stands for it) and its evaluation."""
    distilled, evaluation = tmp_path / "distilled" / "koala-700m", tmp_path / "evaluation" / "koala-700m"
    shutil.copytree(tiny_teacher, distilled)
    for name, text in {"provenance.json": json.dumps(PROVENANCE), "curves.csv": "step\n", "kept.json": "{}"}.items():
        (distilled / name).write_text(text)
    (evaluation / "plots").mkdir(parents=True)
    (evaluation / "metrics.json").write_text(json.dumps(METRICS))
    (evaluation / "summary.md").write_text("| model |\n| --- |\n| teacher |\n")
    (evaluation / "plots" / "grid.png").write_bytes(b"png")
    (evaluation / "report.html").write_text("<p>a report</p>")
    (evaluation / "samples").mkdir()
    (evaluation / "samples" / "000000.png").write_bytes(b"png")
    Values([Prompt("a large red circle", 0)], {"after": {"attributes/all": [1.0]}}).write(evaluation / "values.parquet")
    return {"distilled": distilled, "evaluation": evaluation}


def generated(model: Path) -> np.ndarray:
    sampling, prompts = SamplingConfig(steps=3, guidance=2.0), [("a large red circle on a white background", 3)]
    return np.asarray(generate.generate(generate.load(model, "float32"), prompts, sampling)[0], int)


def unpacked(file: Path, to: Path) -> str:
    """The configurations and tokenizers in a single file."""
    unpack(file, to)
    return "".join(each.read_text() for each in to.rglob("*") if each.is_file())


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of a pipeline folder, by file and name without CLIP-L's prefix."""
    from safetensors.torch import load_file

    return {
        f"{file.relative_to(folder)}:{name.removeprefix('text_model.')}": tensor
        for file in folder.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_a_release_generates_what_the_student_generated(folders, tmp_path, recorder) -> None:
    """In half precision, which images show by a few levels; at the student's own, to the bit."""
    release, exact = tmp_path / "release", tmp_path / "exact"
    publish(CONFIG, **folders, out=release, run=recorder)
    publish(CONFIG.model_copy(update={"dtype": "float32"}), **folders, out=exact, run=NoRun())
    image = generated(folders["distilled"])
    assert np.array_equal(generated(exact), image)
    assert np.abs(generated(release) - image).max() <= 4
    own = weights(folders["distilled"])
    for folder, dtype in ((release, torch.float16), (exact, torch.float32)):
        found = weights(folder)
        assert found.keys() == own.keys()
        assert all((found[name] == own[name].to(dtype)).all() for name in own)
        assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {dtype}
    kinds = {path.suffix for path in release.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".txt", ".md", ".html", ".png", ".parquet", ".safetensors"}
    assert recorder.tagged["released"] == "yes"
    assert set(recorder.files) == {"gate.html", "receipt.json", "README.md"}


def test_a_release_loads_as_one_dtype_whoever_asks_for_none(folders, tmp_path) -> None:
    from diffusers import StableDiffusionXLPipeline

    file = folders["distilled"] / "text_encoder" / "config.json"
    values = {name: value for name, value in json.loads(file.read_text()).items() if name != "dtype"}
    file.write_text(json.dumps(values | {"torch_dtype": "float16"}))  # as the Hub's encoders have it
    publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())
    for asked, found in ((None, torch.float32), (torch.float16, torch.float16)):
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            tmp_path / "release", use_safetensors=True, local_files_only=True, torch_dtype=asked
        )
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        assert {part.dtype for part in parts} == {found}


def test_a_value_that_half_precision_cannot_hold_is_refused(folders, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    file = folders["distilled"] / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KoalaError, match=r"vae: decoder.conv_in.bias has values .*: set publish.dtype to another"):
        publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())


def test_a_release_holds_no_path_of_the_machine_that_made_it(folders, tmp_path) -> None:
    """diffusers notes where a model was loaded from, and so did the tokenizers of transformers 4."""
    place = "/home/ada/models"
    for name, entry in {
        "model_index.json": "_name_or_path",
        "unet/config.json": "_name_or_path",
        "vae/config.json": "_name_or_path",
        "text_encoder/config.json": "_name_or_path",
        "tokenizer/tokenizer_config.json": "special_tokens_map_file",
    }.items():
        file = folders["distilled"] / name
        file.write_text(json.dumps({**json.loads(file.read_text()), entry: f"{place}/{name}"}))
    release = tmp_path / "release"
    publish(CONFIG, **folders, out=release, run=NoRun())
    for file in release.rglob("*"):
        assert not file.is_file() or place.encode() not in file.read_bytes(), file
    tokenizers = unpacked(release / "koala-700m.safetensors", tmp_path / "unpacked")
    assert place not in tokenizers
    assert generated(release).shape == generated(folders["distilled"]).shape


def test_the_teachers_licence_travels_with_the_release(folders, tmp_path) -> None:
    (folders["distilled"] / "LICENSE.md").write_text("use restrictions")
    publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())
    assert (tmp_path / "release" / "LICENSE.md").read_text() == "use restrictions"


def test_a_licence_outside_the_hubs_list_is_named_and_linked(folders, tmp_path) -> None:
    from huggingface_hub import ModelCard

    config = PublishConfig(
        license="other",
        license_name="a-licence",
        license_link="https://example.org/a",
        datasets=("owner/images",),
        base_model="owner/base",
    )
    publish(config, **folders, out=tmp_path / "release", run=NoRun())
    card = ModelCard.load(tmp_path / "release" / "README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "a-licence",
        "https://example.org/a",
    )
    assert (card.data.datasets, card.data.base_model) == (["owner/images"], "owner/base")
    assert "A student of owner/base, distilled" in card.text
    text = (tmp_path / "release" / "LICENSE.md").read_text()
    assert "released under its licence, a-licence" in text
    assert "https://example.org/a" in text
    named = PublishConfig(license="other", license_name="a-licence")
    publish(named, **folders, out=tmp_path / "release", run=NoRun())
    assert ModelCard.load(tmp_path / "release" / "README.md").data.license_link == "LICENSE.md"
    for wrong in ({"license": "other"}, {"license": "mit", "license_name": "a-licence"}):
        with pytest.raises(ValidationError, match="`license: other` goes with a license_name"):
            PublishConfig(**wrong)


def test_a_release_holds_the_pipeline_its_card_and_its_figures(folders, tmp_path) -> None:
    release = tmp_path / "release"
    (release / "unet").mkdir(parents=True)
    (release / "unet" / "old.safetensors").write_bytes(b"of an interrupted call")
    (release / STATE).mkdir()
    publish(CONFIG, **folders, out=release, run=NoRun())
    components = {path.name for path in folders["distilled"].iterdir() if path.is_dir()}
    files = {
        "model_index.json",
        "README.md",
        "metrics.json",
        "report.html",
        "grid.png",
        "training.json",
        "receipt.json",
        "gate.json",
        "LICENSE.md",
        "samples",
        "values.parquet",
    }
    files |= {"koala-700m.safetensors", "koala-700m-unet.safetensors"}  # no workflow: no front end knows the tiny shape
    assert {path.name for path in release.iterdir()} == components | files | {STATE}
    assert not (release / "unet" / "old.safetensors").exists()
    assert json.loads((release / "training.json").read_text()) == PROVENANCE
    assert json.loads((release / "receipt.json").read_text()) == {
        "student": "koala-700m",
        "released": True,
        "run_id": "r1",
        "commit": "abc",
        "rules": [
            {"metric": "attributes/all", "at_least": 0.8, "value": 0.9, "bound": 0.868, "passed": True},
            {
                "metric": "attributes/all",
                "of": "teacher",
                "at_least": 0.9,
                "value": 0.947,
                "bound": 0.911,
                "passed": True,
            },
            {"metric": "unet_parameters", "at_most": 500, "value": 310, "bound": None, "passed": True},
        ],
        "approval": None,
        "promote": "automatic",
        "targets": [],
    }


def test_the_card_is_valid_and_carries_the_figures(folders, tmp_path) -> None:
    from huggingface_hub import ModelCard

    publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())
    card = ModelCard.load(tmp_path / "release" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-to-image"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["attributes/all"] == 0.9
    assert found["speed_up"] == 2.3
    names = {result.metric_type: result.metric_name for result in card.data.eval_results}
    assert names["attributes/all"] == "attributes/all, 95 % interval 0.861 to 0.939"
    assert names["share_of_teacher/attributes/all"].endswith("95 % interval 0.904 to 0.991")
    assert names["speed_up"] is None
    assert "git checkout abc\ndvc repro publish@koala-700m" in card.text
    assert "torch_dtype=torch.float16" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"koala's prompts, profile smoke"}
    assert "31%" in card.text
    assert "MLflow run `r1`" in card.text
    assert "Commit `abc`" in card.text
    assert 'pipeline("a large red circle", num_inference_steps=20, guidance_scale=3)' in card.text
    assert "6 steps of 8 images at a learning rate of 0.0005" in card.text


def test_the_cards_example_is_python_whatever_the_prompt(folders, tmp_path) -> None:
    prompt = 'a sign that says "open",\nat C:\\new, 寿司'
    sampling = CONFIG.sampling.model_copy(update={"prompts": (prompt,)})
    publish(CONFIG.model_copy(update={"sampling": sampling}), **folders, out=tmp_path / "release", run=NoRun())
    code = (tmp_path / "release" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    texts = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert prompt in texts
    assert "寿司" in code


def test_a_commit_with_changes_is_said_to_be_one(folders, tmp_path) -> None:
    (folders["distilled"] / "provenance.json").write_text(json.dumps(PROVENANCE | {"commit": "abc-dirty"}))
    publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())
    text = (tmp_path / "release" / "README.md").read_text()
    assert "To make it again (its tree held changes that are not in the commit)" in text
    assert "git checkout abc\n" in text


def test_a_release_can_be_changed_though_dvcs_files_are_read_only(folders, tmp_path) -> None:
    for file in folders["distilled"].rglob("*"):
        if file.is_file():
            file.chmod(0o444)
    publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "release").rglob("*") if file.is_file())


def test_the_card_says_what_it_is_good_at(folders, tmp_path) -> None:
    def row(category: str, share: float) -> dict:
        return {
            "category": category,
            "score": "s",
            "images": 72,
            "share": share,
            "interval": [share - 0.1, share + 0.1],
        }

    metrics = METRICS | {
        "categories": [row("counts", 0.7), row("scenes", 0.99), row("counts", 0.1) | {"score": "other"}]
    }
    (folders["evaluation"] / "metrics.json").write_text(json.dumps(metrics))
    publish(PublishConfig(license="apache-2.0"), **folders, out=tmp_path / "release", run=NoRun())
    text = (tmp_path / "release" / "README.md").read_text()
    assert "| scenes | 72 | 99.0% (89.0-109.0) |\n| counts | 72 | 70.0% (60.0-80.0) |\n\n## Use it in diffusers" in text


def test_a_pipeline_without_provenance_has_a_card_too(folders, tmp_path) -> None:
    (folders["distilled"] / "provenance.json").unlink()
    config = PublishConfig(license="apache-2.0")
    publish(config, **folders, out=tmp_path / "release", run=NoRun())
    text = (tmp_path / "release" / "README.md").read_text()
    assert "31%" in text
    assert "None" not in text
    assert "training.json" not in text
    assert not (tmp_path / "release" / "training.json").exists()
    assert json.loads((tmp_path / "release" / "receipt.json").read_text())["run_id"] is None


def test_a_student_that_misses_a_rule_is_not_released_and_every_verdict_is_kept(folders, tmp_path, recorder) -> None:
    rules = (
        Requirement(metric="attributes/all", of="teacher", at_least=0.93),  # the share is 0.947, its lower bound 0.911
        Requirement(metric="attributes/all", at_least=0.8),
        Requirement(metric="speed_up", at_least=2.5),
    )
    config = PublishConfig(license="apache-2.0", require=rules, targets=(FolderTarget(path=tmp_path / "shared"),))
    receipts = []
    plain = recorder.artifact

    def artifact(path: Path, folder: str | None = None) -> None:
        if path.suffix == ".json":
            receipts.append(json.loads(path.read_text()))
        plain(path, folder)

    recorder.artifact = artifact
    with pytest.raises(KoalaError) as error:
        publish(config, **folders, out=tmp_path / "release", run=recorder)
    assert str(error.value) == (
        "koala-700m is not released (publish.require): attributes/all of teacher at least 0.93: 0.947, lower bound 0.911; "
        "speed_up at least 2.5: 2.300: train it longer, or change the rule"
    )
    assert not (tmp_path / "release").exists()
    assert not (tmp_path / "shared").exists()
    assert recorder.tagged == {
        "released": "no",
        "gate/attributes/all of teacher at least 0.93": (
            "failed: attributes/all of teacher at least 0.93: 0.947, lower bound 0.911"
        ),
        "gate/attributes/all at least 0.8": "passed",
        "gate/speed_up at least 2.5": "failed: speed_up at least 2.5: 2.300",
    }
    assert recorder.logged["gate/share_of_teacher/attributes/all"] == 0.911
    assert recorder.logged["gate/speed_up"] == 2.3
    assert recorder.files == ["gate.html", "receipt.json"]
    assert receipts[0]["released"] is False
    assert [rule["passed"] for rule in receipts[0]["rules"]] == [False, True, False]


def test_an_evaluation_without_bounds_is_refused(folders, tmp_path) -> None:
    """One of an earlier version: its values alone must not open the gate."""
    file = folders["evaluation"] / "metrics.json"
    file.write_text(json.dumps({name: value for name, value in METRICS.items() if name != "bounds"}))
    with pytest.raises(KoalaError, match=r"no bounds of attributes/all: run `koala evaluate` again"):
        publish(CONFIG, **folders, out=tmp_path / "release", run=NoRun())
    assert judge(json.loads(file.read_text()), CONFIG.require[2:])[0].passed  # a cost needs none


def test_the_receipt_says_where_the_release_went(folders, tmp_path) -> None:
    config = CONFIG.model_copy(update={"targets": (FolderTarget(path=tmp_path / "shared"),)})
    version = tmp_path / "shared" / "koala-700m" / "v1"
    for _ in range(2):  # published a second time: the same
        publish(config, **folders, out=tmp_path / "release", run=NoRun())
        receipt = json.loads((tmp_path / "release" / "receipt.json").read_text())
        assert receipt["targets"] == [{"kind": "folder", "version": "v1", "path": str(version)}]
    sent = {path.relative_to(version).as_posix() for path in version.rglob("*")}
    made = {path.relative_to(tmp_path / "release").as_posix() for path in (tmp_path / "release").rglob("*")}
    assert sent == made - {"receipt.json"} | {"manifest.json"}
    assert config.recipe()["targets"] == [{"kind": "folder", "path": str(tmp_path / "shared")}]


def test_a_release_published_again_beside_itself_as_champion_is_the_same_version(folders, tmp_path) -> None:
    Image.new("RGB", (32, 32)).save(folders["evaluation"] / "samples" / "000000.png")
    rule = Requirement(metric="attributes/all", of="champion", at_least=1)
    targets = (FolderTarget(path=tmp_path / "shared"),)
    config = CONFIG.model_copy(update={"require": (rule, CONFIG.require[1]), "targets": targets})
    release = tmp_path / "release"
    for value in (None, 1.0):  # none to beat, then itself
        publish(config, **folders, out=release, run=NoRun())
        receipt = json.loads((release / "receipt.json").read_text())
        assert receipt["rules"][0]["value"] == value
        assert receipt["targets"][0]["version"] == "v1"
    assert [each["of"] for each in json.loads((release / "gate.json").read_text())["rules"]] == ["teacher"]


def test_what_one_target_lacks_is_said_and_completed_by_publishing_again(
    folders, tmp_path, recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    up = []

    class Down(Target):
        kind: str = "down"

        def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
            if not up:
                raise KoalaError("it is down")
            return {"version": "v1"}

    targets = (Down(), FolderTarget(path=tmp_path / "shared"))
    config = CONFIG.model_copy(update={"targets": targets})
    release = tmp_path / "release"
    with pytest.raises(KoalaError, match="koala-700m: not at target down: it is down: publish again"):
        publish(config, **folders, out=release, run=recorder)
    sent = {"kind": "folder", "version": "v1", "path": str(tmp_path / "shared/koala-700m/v1")}
    assert json.loads((release / "receipt.json").read_text())["targets"] == [
        {"kind": "down", "failed": "it is down"},
        sent,
    ]
    assert "receipt.json" in recorder.files
    assert "released" not in recorder.tagged
    assert [entry[4] for entry in recorder.registered] == ["challenger"]

    up.append(True)
    publish(config, **folders, out=release, run=recorder)
    assert json.loads((release / "receipt.json").read_text())["targets"] == [{"kind": "down", "version": "v1"}, sent]
    assert [path.name for path in (tmp_path / "shared/koala-700m").glob("v*")] == ["v1"]
    assert "git tag -a koala-700m@v1.0.0 -m 'Release koala-700m v1'" in capsys.readouterr().err

    (model, content, files, tags, _), *_ = recorder.registered
    assert (model, content) == ("koala-700m", Manifest.of(release).sha256)
    assert files == ["README.md", "gate.json", "metrics.json", "report.html", "training.json"]
    assert tags == {"git_commit": "abc", "training_run": "r1", "profile": "smoke", "data_hash.latents": "123"}
    *_, (_, same, _, links, alias) = recorder.registered
    assert (same, alias) == (content, "champion")
    assert links == {"down.version": "v1", "folder.version": "v1", "folder.path": sent["path"]}


def test_a_folder_that_cannot_be_written_stops_no_other_target(folders, tmp_path) -> None:
    (tmp_path / "file").touch()
    targets = (FolderTarget(path=tmp_path / "file" / "shared"), FolderTarget(path=tmp_path / "shared"))
    config = CONFIG.model_copy(update={"targets": targets})
    with pytest.raises(KoalaError, match=r"not at target folder: .*Not a directory: .*file/shared.*: publish again"):
        publish(config, **folders, out=tmp_path / "release", run=NoRun())
    assert targets[1].shelf("koala-700m").latest() == "v1"


def test_a_target_of_a_user_needs_no_change_elsewhere(folders, tmp_path) -> None:
    sent = []

    class Remember(Target):
        kind: str = "remember"

        def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
            sent.append((name, (release / "README.md").is_file()))
            return {"version": "1"}

    publish(CONFIG.model_copy(update={"targets": (Remember(),)}), **folders, out=tmp_path / "release", run=NoRun())
    assert sent == [("koala-700m", True)]
    receipt = json.loads((tmp_path / "release" / "receipt.json").read_text())
    assert receipt["targets"] == [{"kind": "remember", "version": "1"}]


def test_a_release_loads_under_transformers_4_too(folders, tmp_path) -> None:
    """It wants CLIP-L's prefixed names, and vocab.json and merges.txt: what its slow tokenizer reads is read here."""
    from safetensors import safe_open
    from transformers import CLIPTextModel, CLIPTokenizer

    release, text = tmp_path / "release", "a large red circle on a white background"
    publish(CONFIG, **folders, out=release, run=NoRun())
    with safe_open(release / "text_encoder/model.safetensors", "pt") as tensors:
        assert all(name.startswith("text_model.") for name in list(tensors.keys()))
        assert tensors.metadata() == {"format": "pt"}
    _, found = CLIPTextModel.from_pretrained(release / "text_encoder", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    for name in ("tokenizer", "tokenizer_2"):
        vocabulary = json.loads((release / name / "vocab.json").read_text())
        version, *merges = (release / name / "merges.txt").read_text().strip().split("\n")
        assert version.startswith("#version")
        rebuilt = CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges])
        own = CLIPTokenizer.from_pretrained(folders["distilled"] / name)
        assert (
            rebuilt(text).input_ids
            == own(text).input_ids
            == CLIPTokenizer.from_pretrained(release / name)(text).input_ids
        )


def test_the_single_file_of_a_release_generates(folders, tmp_path) -> None:
    release = tmp_path / "release"
    publish(CONFIG, **folders, out=release, run=NoRun())
    sampling, prompts = SamplingConfig(steps=2, guidance=2.0), [("a large red circle on a white background", 3)]
    images = [
        np.asarray(generate.generate(generate.load(model, "float32"), prompts, sampling)[0], int)
        for model in (folders["distilled"], release / "koala-700m.safetensors")
    ]
    assert np.abs(images[0] - images[1]).max() <= 4  # weights rounded to float16
    card = (release / "README.md").read_text()
    assert "`koala-700m.safetensors`: the whole model" in card
    assert "do not recognise this shape" in card
    assert "diffusion-single-file" in card
    assert "comfyui" not in card.partition("# koala-700m")[0]


def test_single_files_may_be_left_out(folders, tmp_path) -> None:
    publish(CONFIG.model_copy(update={"single_file": False}), **folders, out=tmp_path / "release", run=NoRun())
    assert not list((tmp_path / "release").glob("*.safetensors"))
    assert "single" not in (tmp_path / "release" / "README.md").read_text().lower()


def test_a_student_that_comfyui_recognises_has_a_workflow(folders, tmp_path, monkeypatch) -> None:
    from koala.publish import single_file

    monkeypatch.setattr(single_file, "recognised_as", lambda _: "KOALA_700M")
    release = tmp_path / "release"
    publish(CONFIG, **folders, out=release, run=NoRun())
    graph = json.loads((release / "koala-700m-comfyui.json").read_text())
    for node in graph.values():  # every link leads to a node
        assert all(value[0] in graph for value in node["inputs"].values() if isinstance(value, list))
    sample = graph["sample"]["inputs"]
    assert (sample["steps"], sample["cfg"], sample["sampler_name"], sample["scheduler"]) == (20, 3.0, "euler", "normal")
    assert graph["checkpoint"]["inputs"] == {"ckpt_name": "koala-700m.safetensors"}
    assert graph[sample["negative"][0]]["class_type"] == "ConditioningZeroOut"
    assert graph["prompt"]["inputs"]["text"] == "a large red circle"
    card = (release / "README.md").read_text()
    assert "## Use it in ComfyUI" in card
    assert "ComfyUI recognises it as KOALA_700M" in card
    assert "`koala-700m-comfyui.json`" in card
    assert "- comfyui\n" in card


def test_a_workflow_of_a_few_step_model_has_no_guidance_and_trailing_timesteps() -> None:
    """ComfyUI calls 1 what diffusers calls 0."""
    graph = workflow(
        "x.safetensors", "a fox", SamplingConfig(steps=4, guidance=0), 512, {"timestep_spacing": "trailing"}
    )
    sample = graph["sample"]["inputs"]
    assert (sample["cfg"], sample["steps"], sample["scheduler"]) == (1.0, 4, "sgm_uniform")
    assert (graph["latent"]["inputs"]["width"], graph["latent"]["inputs"]["height"]) == (512, 512)


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, ("euler", "normal")),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, ("euler_ancestral", "normal")),  # SDXL-Turbo's
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, ("dpmpp_2m", "karras")),
        ({"_class_name": "AnotherScheduler"}, ("euler", "normal")),
    ],
)
def test_a_workflow_samples_as_the_pipeline_does(scheduler, found) -> None:
    sample = workflow("x.safetensors", "a fox", SamplingConfig(), 512, scheduler)["sample"]["inputs"]
    assert (sample["sampler_name"], sample["scheduler"]) == found


def test_a_pipeline_that_encodes_the_empty_prompt_does_so_in_comfyui(folders, tmp_path, monkeypatch) -> None:
    from koala.publish import single_file

    monkeypatch.setattr(single_file, "recognised_as", lambda _: "KOALA_700M")
    file = folders["distilled"] / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "force_zeros_for_empty_prompt": False}))
    release = tmp_path / "release"
    publish(CONFIG, **folders, out=release, run=NoRun())
    negative = json.loads((release / "koala-700m-comfyui.json").read_text())["negative"]
    assert (negative["class_type"], negative["inputs"]["text"]) == ("CLIPTextEncode", "")
    assert "in any SDXL workflow." in (release / "README.md").read_text()


def test_a_release_that_a_person_is_asked_about_is_a_candidate_and_what_stands_stays(
    folders, tmp_path, recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.model_copy(update={"targets": (FolderTarget(path=tmp_path / "shared"),)})
    asks = config.model_copy(update={"promote": "ask"})
    shelf = config.targets[0].shelf("koala-700m")
    publish(asks, **folders, out=tmp_path / "release", run=recorder)
    assert (shelf.versions(), shelf.latest()) == (["v1"], None)
    publish(config, **folders, out=tmp_path / "release", run=NoRun())
    assert shelf.latest() == "v1"

    (folders["evaluation"] / "summary.md").write_text("| another |")
    publish(asks, **folders, out=tmp_path / "release", run=recorder)
    assert (shelf.versions(), shelf.latest()) == (["v1", "v2"], "v1")
    assert {entry[4] for entry in recorder.registered} == {"challenger"}
    assert recorder.registered[-1][3]["folder.version"] == "v2"
    receipt = json.loads((tmp_path / "release/receipt.json").read_text())
    assert (receipt["promote"], receipt["released"], receipt["targets"][0]["version"]) == ("ask", True, "v2")
    assert "koala-700m v2 is at the targets as a candidate, and what stands there stays" in capsys.readouterr().err
