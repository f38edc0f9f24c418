"""Single files in SDXL's original layout: every value, read back by diffusers' own converters and by koala's loader."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from publish.small import STUDENTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from koala import generate
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.publish.single_file import recognised_as, write_checkpoint, write_unet
from koala.run import NoRun
from koala.teacher.config import FileTeacher
from koala.teacher.embedded import CONFIGURATIONS, metadata
from koala.teacher.original import unet_blocks
from koala.teacher.shape import shape_of
from koala.teacher.teacher import teacher
from koala.unet.blocks import keep
from koala.unet.reference import SDXL
from koala.unet.student import empty_unet, student_config

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
ABOUT = {"title": "a student", "license": "openrail++"}


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def written(folder: Path, to: Path, dtype: str | None = None) -> dict[str, Tensor]:
    write_checkpoint(folder, to, **ABOUT, dtype=dtype)
    return load_file(to)


def read_by_diffusers(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """The parts as diffusers' own converters read them, which share no code with koala's."""
    config = {part: json.loads((folder / part / "config.json").read_text()) for part in PARTS}

    class Model:
        class config:  # noqa: N801
            hidden_size = config["text_encoder_2"]["hidden_size"]

    return {
        "unet": convert_ldm_unet_checkpoint(dict(tensors), config["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(tensors), config["vae"]),
        "text_encoder": convert_ldm_clip_checkpoint(dict(tensors)),
        "text_encoder_2": convert_open_clip_checkpoint(Model, dict(tensors), CLIP_G),
    }


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items() if "position_ids" not in name}


@pytest.mark.parametrize("student", STUDENTS)
def test_every_value_is_where_diffusers_own_converters_look(
    student: str, student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = student_folder(student)
    tensors = written(folder, tmp_path / "file.safetensors")
    found = read_by_diffusers(tensors, folder)
    for part in PARTS:
        expected, read = plain(weights(folder, part)), plain(found[part])
        assert expected.keys() == read.keys(), part
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name
    assert len(tensors) == sum(len(plain(weights(folder, part))) for part in PARTS) - 4 * 2 + 1  # fused; position_ids


@pytest.mark.parametrize("prefixed", [True, False])
def test_clip_l_is_prefixed_whatever_its_names_in_the_folder(
    prefixed: bool, student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(student_folder("koala-700m"), tmp_path / "folder"))
    own = plain(weights(folder, "text_encoder"))
    prefix = "text_model." if prefixed else ""
    save_file({prefix + name: tensor for name, tensor in own.items()}, folder / "text_encoder/model.safetensors")
    tensors = written(folder, tmp_path / "file.safetensors")
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith(CLIP_L)}
    positions = stored.pop(f"{CLIP_L}text_model.embeddings.position_ids")
    assert positions.tolist() == [list(range(16))]
    assert stored.keys() == {f"{CLIP_L}text_model.{name}" for name in own}
    assert all(torch.equal(stored[f"{CLIP_L}text_model.{name}"], tensor) for name, tensor in own.items())


def test_text_projection_is_transposed(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = student_folder("koala-700m")
    projection = weights(folder, "text_encoder_2")["text_projection.weight"]
    assert projection.shape[0] == projection.shape[1]  # neither name nor shape would show it
    stored = written(folder, tmp_path / "file.safetensors")[f"{CLIP_G}text_projection"]
    assert torch.equal(stored, projection.T)
    assert not torch.equal(stored, projection)


def test_in_proj_holds_q_then_k_then_v(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = student_folder("koala-700m")
    own, tensors = plain(weights(folder, "text_encoder_2")), written(folder, tmp_path / "file.safetensors")
    for kind in ("weight", "bias"):
        thirds = tensors[f"{CLIP_G}transformer.resblocks.1.attn.in_proj_{kind}"].chunk(3)
        for letter, third in zip("qkv", thirds, strict=True):
            assert torch.equal(third, own[f"encoder.layers.1.self_attn.{letter}_proj.{kind}"])


def test_the_vaes_decoder_counts_from_the_image_and_attends_by_convolutions(
    student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = student_folder("koala-700m")
    own, tensors = weights(folder, "vae"), written(folder, tmp_path / "file.safetensors")
    for level in range(3):
        stored = tensors[f"first_stage_model.decoder.up.{level}.block.0.conv2.weight"]
        assert torch.equal(stored, own[f"decoder.up_blocks.{2 - level}.resnets.0.conv2.weight"])
    assert "first_stage_model.decoder.up.0.upsample.conv.weight" not in tensors
    for name, ours in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
        stored = tensors[f"first_stage_model.encoder.mid.attn_1.{name}.weight"]
        assert stored.shape == (128, 128, 1, 1)
        assert torch.equal(stored[:, :, 0, 0], own[f"encoder.mid_block.attentions.0.{ours}.weight"])


def test_a_vae_with_the_names_of_older_diffusers(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student_folder("koala-700m"), tmp_path / "folder"))
    expected = written(folder, tmp_path / "new.safetensors")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in weights(folder, "vae").items():
        for new, old in older.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    save_file(tensors, folder / "vae/diffusion_pytorch_model.safetensors")
    found = written(folder, tmp_path / "old.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def of_sdxl(student: str) -> dict[str, Any]:
    """The configuration of a student of SDXL's width."""
    return student_config(SDXL, keep(SDXL, STUDENTS[student]))


@pytest.mark.parametrize("student", STUDENTS)
def test_at_sdxls_width_blocks_have_no_gap_and_no_block_holds_two(student: str) -> None:
    config = of_sdxl(student)
    names = unet_blocks(config)
    assert len(set(names.values())) == len(names)
    for side in ("input_blocks", "output_blocks"):
        numbers = {int(name.split(".")[1]) for name in names.values() if name.startswith(side)}
        assert numbers == set(range(len(numbers)))
    parameters = {name.rpartition(".")[0] for name in empty_unet(config).state_dict()}
    assert all(any(f"{module}.".startswith(f"{block}.") for block in names) for module in parameters)
    assert all(any(f"{module}.".startswith(f"{block}.") for module in parameters) for block in names)


@pytest.mark.parametrize("student", STUDENTS)
def test_at_sdxls_width_names_and_shapes_are_those_that_diffusers_reads_back(student: str) -> None:
    from koala.teacher.original import places

    unet = empty_unet(of_sdxl(student))
    place = places("unet", unet.config)
    expected = unet.state_dict()
    stored = {}
    for name, tensor in expected.items():
        origin = place(name)
        assert origin is not None
        stored[origin.name] = origin.write(tensor)
    assert len(stored) == len(expected)
    read = convert_ldm_unet_checkpoint(stored, unet.config)
    assert {name: tensor.shape for name, tensor in read.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize(
    ("student", "expected"),
    {  # ComfyUI's own tables: residual blocks of the down stages, layers on the way down, up (from the image on) and in the middle
        "koala-700m": ([1, 1, 1], [0, 2, 5], [0, 0, 2, 2, 5, 5], 0),
        "koala-1b": ([1, 1, 1], [0, 2, 6], [0, 0, 2, 2, 6, 6], 6),
        "sdxl": ([2, 2, 2], [0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
        "ssd-1b": ([2, 2, 2], [0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], 0),
        "vega": ([2, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], 0),
    }.items(),
)
def test_a_front_end_counts_from_the_names_what_its_tables_hold(student: str, expected: tuple[Any, ...]) -> None:
    from koala.teacher.original import places

    unet = empty_unet(of_sdxl(student))
    place = places("unet", unet.config)
    found = [place(name) for name in unet.state_dict()]
    names = {origin.name.removeprefix("model.diffusion_model.") for origin in found if origin}

    def layers(block: str) -> int:
        own = [name for name in names if name.startswith(f"{block}.1.transformer_blocks.")]
        return len({name.removeprefix(block).split(".")[3] for name in own})

    stages, down, up = [0], [], []
    for number in range(1, 20):  # more blocks than there are
        if f"input_blocks.{number}.0.op.weight" in names:
            stages.append(0)
        elif f"input_blocks.{number}.0.in_layers.0.weight" in names:
            stages[-1] += 1
            down.append(layers(f"input_blocks.{number}"))
        if f"output_blocks.{number - 1}.0.in_layers.0.weight" in names:
            up.insert(0, layers(f"output_blocks.{number - 1}"))
    assert (stages, down, up, layers("middle_block")) == expected


def test_names_of_koala_700m_at_sdxls_width() -> None:
    """The blocks by hand: one pair a stage on the way down, two on the way up, no mid block."""
    names = unet_blocks(of_sdxl("koala-700m"))
    blocks = {name: original for name, original in names.items() if "_blocks" in name}
    assert blocks == {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0": "input_blocks.2.0",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "down_blocks.1.downsamplers.0": "input_blocks.4.0",
        "down_blocks.2.resnets.0": "input_blocks.5.0",
        "down_blocks.2.attentions.0": "input_blocks.5.1",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0": "output_blocks.1.2",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "up_blocks.1.upsamplers.0": "output_blocks.3.2",
        "up_blocks.2.resnets.0": "output_blocks.4.0",
        "up_blocks.2.resnets.1": "output_blocks.5.0",
    }


@pytest.mark.parametrize(
    ("student", "recognised"),
    {
        "koala-700m": "KOALA_700M",
        "koala-1b": "KOALA_1B",
        "sdxl": "SDXL",
        "ssd-1b": "SSD1B",
        "vega": "Segmind_Vega",
        "bk-base": None,
        "700m-with-mid": "KOALA_700M",  # only the down stages decide
        "resnets-in-mid": None,
    }.items(),
)
def test_what_front_ends_make_of_a_shape(student: str, recognised: str | None) -> None:
    config = of_sdxl(student)
    assert recognised_as(config) == recognised
    assert recognised_as(json.loads(json.dumps(config))) == recognised
    assert recognised_as({**config, "norm_num_groups": 16}) is None
    assert recognised_as({**config, "block_out_channels": (32, 64, 128)}) is None


def images(pipeline: Any) -> list[np.ndarray]:
    prompts = [("a large red circle on a white background", 1), ("a small blue square on black", 2)]
    return [np.asarray(image) for image in generate.generate(pipeline, prompts, SamplingConfig(steps=2, guidance=3.0))]


@pytest.mark.parametrize("student", ["koala-700m", "koala-1b", "bk-base"])
def test_koala_generate_reads_the_file_offline_bit_for_bit(
    student: str, student_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    folder, file = student_folder(student), tmp_path / "file.safetensors"
    write_checkpoint(folder, file, **ABOUT, dtype=None)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    of_file, of_folder = generate.load(file, "float32"), generate.load(folder, "float32")
    for part in PARTS:
        expected, found = getattr(of_folder, part).state_dict(), getattr(of_file, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not getattr(of_file, part).training
    assert dict(of_file.scheduler.config) == dict(of_folder.scheduler.config)
    assert of_file.tokenizer.get_vocab() == of_folder.tokenizer.get_vocab()
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(images(of_file), images(of_folder), strict=True))


@pytest.mark.parametrize("student", ["koala-700m", "koala-1b"])
def test_diffusers_reads_the_file_with_the_folder_as_its_configuration(
    student: str, student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, file = student_folder(student), tmp_path / "file.safetensors"
    write_checkpoint(folder, file, **ABOUT, dtype=None)
    of_file = StableDiffusionXLPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    of_folder = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    for part in PARTS:
        expected, found = plain(getattr(of_folder, part).state_dict()), plain(getattr(of_file, part).state_dict())
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_unets_file_generates_with_the_other_parts_of_a_base(
    student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    student, base, file = student_folder("koala-700m"), student_folder("sdxl"), tmp_path / "unet.safetensors"
    write_unet(student, file, **ABOUT, dtype=None)
    of_file = generate.load(file, "float32", base)
    assert not of_file.unet.training
    assert all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(images(of_file), images(generate.load(student, "float32")), strict=True)
    )
    with pytest.raises(KoalaError, match=r"is a U-Net: name the model whose text encoders and VAE it takes \(--base\)"):
        generate.load(file)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors.pop(min(tensors))
    save_file(tensors, file, metadata)
    with pytest.raises(KoalaError, match="does not hold the U-Net of its configuration"):
        generate.load(file, "float32", base)


def test_a_file_is_a_teacher_without_a_folder_beside_it(
    student_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    folder, file, out = student_folder("koala-1b"), tmp_path / "file.safetensors", tmp_path / "teacher"
    write_checkpoint(folder, file, **ABOUT)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    config = FileTeacher(path=file)
    shape, expected = config.shape(), shape_of(folder)
    assert json.loads(json.dumps(dict(shape.unet))) == dict(expected.unet)
    assert (shape.latent_factor, shape.tokens) == (expected.latent_factor, expected.tokens)
    assert shape.text_parameters == expected.text_parameters
    out.mkdir()
    teacher(config, out=out, run=NoRun())
    for part in PARTS:
        ours, theirs = plain(weights(out, part)), plain(weights(folder, part))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor.half()) for name, tensor in theirs.items())
    loaded = StableDiffusionXLPipeline.from_pretrained(out, use_safetensors=True, local_files_only=True)
    assert loaded.unet.config.layers_per_block == 1


def test_the_header_says_what_the_file_is(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = student_folder("koala-700m"), tmp_path / "new" / "file.safetensors"
    write_checkpoint(folder, file, **ABOUT)
    with safe_open(file, "pt") as tensors:
        spec = tensors.metadata()
        kinds = {tensors.get_slice(name).get_dtype() for name in list(tensors.keys())}
    assert kinds == {"F16", "I64"}
    assert spec == metadata(file)
    assert spec["modelspec.title"] == "a student"
    assert spec["modelspec.license"] == "openrail++"
    assert spec["modelspec.prediction_type"] == "epsilon"
    assert spec["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert spec["modelspec.resolution"] == "32x32"
    unet = json.loads(spec[CONFIGURATIONS])["unet/config.json"]
    assert unet == json.loads((folder / "unet/config.json").read_text())
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    again = tmp_path / "again.safetensors"
    write_checkpoint(folder, again, **ABOUT)
    assert again.read_bytes() == file.read_bytes()


def test_objectives_other_than_epsilon_are_marked_as_front_ends_want_it(
    student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(student_folder("koala-700m"), tmp_path / "folder"))
    assert not {"v_pred", "ztsnr"} & written(folder, tmp_path / "epsilon.safetensors").keys()
    scheduler = folder / "scheduler/scheduler_config.json"
    values = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | values))
    tensors = written(folder, tmp_path / "v.safetensors")
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    assert metadata(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"
    (tmp_path / "teacher").mkdir()
    teacher(FileTeacher(path=tmp_path / "v.safetensors"), out=tmp_path / "teacher", run=NoRun())


def test_the_unet_has_a_file_under_diffusers_names(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = student_folder("koala-700m"), tmp_path / "unet.safetensors"
    write_unet(folder, file, **ABOUT)
    found, expected = load_file(file), weights(folder, "unet")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in expected.items())
    assert set(json.loads(metadata(file)[CONFIGURATIONS])) == {"unet/config.json"}
    with pytest.raises(
        KoalaError, match=r"unet.safetensors is not a whole pipeline \(a U-Net's file\?\): give the file"
    ):
        FileTeacher(path=file).shape()


def test_sharded_weights_give_the_same_file(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = student_folder("koala-700m")
    write_checkpoint(folder, tmp_path / "one.safetensors", **ABOUT)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    assert len(list((tmp_path / "sharded/unet").glob("*.safetensors"))) > 1
    one, two = load_file(tmp_path / "one.safetensors"), written(tmp_path / "sharded", tmp_path / "two", "float16")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_written_is_one_line_and_leaves_no_file(
    student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(student_folder("koala-700m"), tmp_path / "folder"))
    file, unet = tmp_path / "out" / "file.safetensors", folder / "unet/diffusion_pytorch_model.safetensors"
    own = load_file(unet)
    save_file(own | {"conv_in.bias": torch.full((32,), 1e6)}, unet)
    with pytest.raises(KoalaError, match=r"input_blocks\.0\.0\.bias has values that are not finite in .*float16"):
        write_checkpoint(folder, file, **ABOUT)
    assert list(file.parent.iterdir()) == []
    save_file(own | {"extra.weight": torch.zeros(1)}, unet)
    with pytest.raises(KoalaError, match=r"its unet has extra.weight, for which SDXL's layout has no place"):
        write_checkpoint(folder, file, **ABOUT)
    unet.unlink()
    with pytest.raises(KoalaError, match=r"unet has no diffusion_pytorch_model.safetensors"):
        write_checkpoint(folder, file, **ABOUT)


def test_a_file_that_lost_a_tensor_or_names_a_path_outside_is_refused(
    student_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, file = student_folder("koala-700m"), tmp_path / "file.safetensors"
    tensors = written(folder, file)
    kept = metadata(file)
    lost = "model.diffusion_model.output_blocks.5.0.skip_connection.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, kept)
    with pytest.raises(KoalaError, match=f"its unet lacks {lost}"):
        generate.load(file)
    save_file(tensors | {lost: torch.zeros(1)}, file, kept)
    with pytest.raises(KoalaError, match=f"{lost} does not fit"):
        generate.load(file)
    outside = json.dumps(json.loads(kept[CONFIGURATIONS]) | {"../outside.json": {}})
    save_file(tensors, file, kept | {CONFIGURATIONS: outside})
    with pytest.raises(KoalaError, match=r"'\.\./outside\.json', which is no file of a pipeline"):
        generate.load(file)
