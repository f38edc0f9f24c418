"""A teacher in one file of SDXL's original layout: its values, its dtypes, and files that are something else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from koala.demo.images import Shapes
from koala.errors import KoalaError
from koala.run import NoRun
from koala.teacher.config import FileTeacher, FitConfig, TinyTeacher
from koala.teacher.local import SDXL_REPOSITORY, SDXL_REVISION
from koala.teacher.teacher import teacher
from koala.teacher.tiny import build_tokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline of SDXL's shape: text encoders of two widths, by which diffusers tells them apart."""
    torch.manual_seed(0)
    fit = FitConfig(steps=1, batch_size=1, learning_rate=1e-3)
    tiny = TinyTeacher(images=Shapes(count=1), unet_channels=(16, 32, 32), text_width=32, vae=fit, unet=fit)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    second = tiny.text_config() | {"hidden_size": 48, "projection_dim": 48}
    unet = tiny.unet_config() | {"cross_attention_dim": 32 + 48, "projection_class_embeddings_input_dim": 6 * 8 + 48}
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 24),
            layers_per_block=2,
            norm_num_groups=4,
            sample_size=32,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**tiny.text_config(), **ids)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second, **ids)),
        tokenizer=build_tokenizer(tiny),
        tokenizer_2=build_tokenizer(tiny),
        unet=UNet2DConditionModel(**unet),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("sdxl")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def renamed(name: str, *rules: tuple[str, str]) -> str:
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


def original_unet(name: str) -> str:
    """The name in the original layout of a tensor of a U-Net of three levels with two pairs each."""

    def down(match: re.Match[str]) -> str:
        return f"input_blocks.{1 + 3 * int(match[1]) + int(match[3])}.{int(match[2] == 'attentions')}."

    def up(match: re.Match[str]) -> str:
        return f"output_blocks.{3 * int(match[1]) + int(match[3])}.{int(match[2] == 'attentions')}."

    name = re.sub(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", down, name)
    name = re.sub(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", up, name)
    name = re.sub(
        r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda match: f"input_blocks.{3 + 3 * int(match[1])}.0.op", name
    )
    # Behind the transformer where a level has one.
    name = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0\.conv",
        lambda match: f"output_blocks.{2 + 3 * int(match[1])}.{2 if int(match[1]) < 2 else 1}.conv",
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle_block.1")
    name = renamed(
        name,
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^add_embedding\.linear_1", "label_emb.0.0"),
        (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
    )
    if re.match(r"(input_blocks|output_blocks|middle_block)", name) and "transformer" not in name:
        name = renamed(
            name,
            (r"\.norm1\.", ".in_layers.0."),
            (r"\.conv1\.", ".in_layers.2."),
            (r"\.time_emb_proj\.", ".emb_layers.1."),
            (r"\.norm2\.", ".out_layers.0."),
            (r"\.conv2\.", ".out_layers.3."),
            (r"\.conv_shortcut\.", ".skip_connection."),
        )
    return f"model.diffusion_model.{name}"


def original_vae(name: str) -> str:
    """The name in the original layout of a tensor of a VAE of three levels: levels are counted from the image, up and down."""
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{2 - int(match[1])}", name)
    name = renamed(
        name,
        (r"down_blocks\.(\d)", r"down.\1"),
        (r"(up|down)\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3"),
        (r"downsamplers\.0\.conv", "downsample.conv"),
        (r"upsamplers\.0\.conv", "upsample.conv"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    )
    return f"first_stage_model.{name}"


def original_clip_g(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's layout: q, k and v in one tensor, the projection transposed."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found = {
        "positional_embedding": tensors.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": tensors.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": tensors.pop("final_layer_norm.weight"),
        "ln_final.bias": tensors.pop("final_layer_norm.bias"),
        "text_projection": tensors.pop("text_projection.weight").T,
    }
    for name, tensor in tensors.items():
        layer, rest = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
        block = f"transformer.resblocks.{layer}"
        if match := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest):
            three = [tensors[f"encoder.layers.{layer}.self_attn.{each}_proj.{match[1]}"] for each in "qkv"]
            found[f"{block}.attn.in_proj_{match[1]}"] = torch.cat(three)
        elif not re.match(r"self_attn\.[kv]_proj", rest):
            new = renamed(
                rest,
                (r"^self_attn\.", "attn."),
                (r"^layer_norm(\d)", r"ln_\1"),
                (r"^mlp\.fc1", "mlp.c_fc"),
                (r"^mlp\.fc2", "mlp.c_proj"),
            )
            found[f"{block}.{new}"] = tensor
    return {CLIP_G + name: tensor for name, tensor in found.items()}


def original(folder: Path) -> dict[str, Tensor]:
    """All tensors of a pipeline's folder in the original layout."""
    loaded = {part: load_file(next((folder / part).glob("*.safetensors"))) for part in PARTS}
    found = {original_unet(name): tensor for name, tensor in loaded["unet"].items()}
    for name, tensor in loaded["vae"].items():
        square = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        found[original_vae(name)] = tensor[:, :, None, None] if square else tensor
    clip_l = loaded["text_encoder"].items()
    found |= {f"{CLIP_L}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip_l}
    found[f"{CLIP_L}text_model.embeddings.position_ids"] = torch.arange(16)[None]
    found |= original_clip_g(loaded["text_encoder_2"])
    found[f"{CLIP_G}logit_scale"] = torch.tensor(4.6)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def take(out: Path, **options: Any) -> Path:
    out.mkdir(exist_ok=True)
    teacher(FileTeacher(**options), out=out, run=NoRun())
    return out


@pytest.fixture
def file(sdxl: Path, tmp_path: Path) -> Path:
    """The tiny pipeline as one file."""
    save_file(original(sdxl), tmp_path / "sdxl.safetensors")
    return tmp_path / "sdxl.safetensors"


@pytest.fixture
def configurations(sdxl: Path, tmp_path: Path) -> Path:
    """The tiny pipeline's folder without any weights."""
    return Path(shutil.copytree(sdxl, tmp_path / "configurations", ignore=shutil.ignore_patterns("*.safetensors")))


def generate(folder: Path) -> Tensor:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a large red circle on a white background", "a small blue square on black"],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pt",
    ).images
    return images


def test_a_file_gives_the_weights_and_images_of_its_folder(
    sdxl: Path, file: Path, configurations: Path, tmp_path: Path
) -> None:
    out = take(tmp_path / "out", path=file, config=configurations)
    for part in PARTS:
        (weights,) = (sdxl / part).glob("*.safetensors")
        expected, found = load_file(weights), load_file(out / part / weights.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (out / name).read_bytes() == (configurations / name).read_bytes()
    assert torch.equal(generate(out), generate(sdxl))


def test_without_config_sdxls_configurations_come_from_the_hub_and_no_weights(
    sdxl: Path, file: Path, tmp_path: Path, hub: Any
) -> None:
    shutil.copytree(sdxl, hub.root / SDXL_REPOSITORY)
    hub.revisions[SDXL_REPOSITORY] = SDXL_REVISION
    out = take(tmp_path / "out", path=file)
    assert torch.equal(generate(out), generate(sdxl))
    assert hub.asked
    assert not [path for path in hub.asked if path.endswith((".safetensors", ".bin"))]


def test_each_part_keeps_the_dtype_that_it_has_in_the_file(sdxl: Path, configurations: Path, tmp_path: Path) -> None:
    tensors = original(sdxl)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.startswith("first_stage_model"):
            tensors[name] = tensor.half()
    save_file(tensors, tmp_path / "mixed.safetensors")
    out = take(tmp_path / "out", path=tmp_path / "mixed.safetensors", config=configurations)
    for part in PARTS:
        (weights,) = (out / part).glob("*.safetensors")
        found = load_file(weights)
        expected = load_file(next((sdxl / part).glob("*.safetensors")))
        kind = torch.float32 if part == "vae" else torch.float16
        assert {tensor.dtype for tensor in found.values()} == {kind}
        assert all(torch.equal(tensor, expected[name].to(kind)) for name, tensor in found.items())


def test_a_file_all_in_half_precision_stays_so(sdxl: Path, configurations: Path, tmp_path: Path) -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in original(sdxl).items()}
    save_file(halves, tmp_path / "half.safetensors")
    out = take(tmp_path / "out", path=tmp_path / "half.safetensors", config=configurations)
    for weights in out.glob("*/*.safetensors"):
        with safe_open(weights, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in list(opened.keys())} == {torch.float16}
    expected = load_file(sdxl / "unet/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(out / "unet/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, expected[name].half())


def test_a_vae_from_the_hub_takes_the_place_of_the_files(
    sdxl: Path, configurations: Path, tmp_path: Path, hub: Any
) -> None:
    tensors = {name: tensor for name, tensor in original(sdxl).items() if not name.startswith("first_stage_model")}
    save_file(tensors, tmp_path / "no-vae.safetensors")
    with pytest.raises(KoalaError, match=r"no-vae.safetensors lacks SDXL's vae .*: set `vae` to one of the Hub"):
        take(tmp_path / "out", path=tmp_path / "no-vae.safetensors", config=configurations)
    shutil.copytree(sdxl / "vae", hub.root / "us/vae")
    vae = {"repository": "us/vae", "revision": REVISION}
    out = take(tmp_path / "out", path=tmp_path / "no-vae.safetensors", config=configurations, vae=vae)
    assert torch.equal(generate(out), generate(sdxl))


Tensors = dict[str, Tensor]


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without("label_emb"), r"lacks SDXL's unet in the original layout"),
        (without("conditioner.embedders.0"), r"lacks SDXL's text_encoder in the original layout"),
        (without("conditioner.embedders.1"), r"lacks SDXL's text_encoder_2 in the original layout"),
        (
            without("output_blocks.3.0.in_layers.2"),
            r"does not fit .* of the same shape: it lacks tensors that they name",
        ),
        (without("resblocks.1.mlp"), r"the text_encoder_2 lacks 4 tensors"),
        (
            without("first_stage_model.decoder.mid"),
            r"does not fit .* of the same shape: it lacks tensors that they name",
        ),
        (
            lambda tensors: tensors | {"model.diffusion_model.input_blocks.8.1.extra.weight": torch.zeros(1)},
            r"the file's U-Net has 1 tensors more",
        ),
        (
            lambda tensors: tensors | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)},
            r"does not fit the configurations of its pipeline: set `config` to the folder of a pipeline of the same shape",
        ),
        (
            lambda tensors: tensors | {"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)},
            r"is trained with EDM's noise \(it holds edm_mean\)",
        ),
        (
            lambda tensors: tensors | {"v_pred": torch.zeros(0)},
            r"is trained for v_prediction, where its scheduler says epsilon: set `scheduler: \{prediction_type: v_prediction",
        ),
        (
            lambda tensors: tensors | {"ztsnr": torch.zeros(0)},
            r"zero terminal SNR, where its scheduler has none: set `scheduler: \{rescale_betas_zero_snr: true",
        ),
        (
            lambda tensors: {
                name: tensor.to(torch.float8_e4m3fn) if "diffusion_model" in name else tensor
                for name, tensor in tensors.items()
            },
            r"holds float8 weights: give the file in float16",
        ),
        (lambda tensors: {"lora_unet_x.lora_up.weight": torch.zeros(1)}, r"lacks SDXL's unet"),
    ],
)
def test_a_file_that_is_something_else_is_one_line(
    sdxl: Path, configurations: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], line: str
) -> None:
    save_file(change(original(sdxl)), tmp_path / "other.safetensors")
    with pytest.raises(KoalaError, match=line) as raised:
        take(tmp_path / "out", path=tmp_path / "other.safetensors", config=configurations)
    assert "other.safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out/model_index.json").exists()


def test_a_file_says_its_prediction_type_in_its_metadata(sdxl: Path, configurations: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    save_file(original(sdxl), file, metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(KoalaError, match="is trained for v_prediction"):
        take(tmp_path / "out", path=file, config=configurations)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    save_file(original(sdxl) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    out = take(
        tmp_path / "out", path=file, config=configurations, scheduler={"prediction_type": "v_prediction", **zero_snr}
    )
    written = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert written["prediction_type"] == "v_prediction"
    assert written["rescale_betas_zero_snr"] is True


def test_configurations_of_another_shape_are_one_line(file: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(KoalaError, match=r"sdxl\.safetensors does not fit the configurations of its pipeline"):
        take(tmp_path / "out", path=file, config=tiny_teacher)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nowhere.safetensors", "there is no teacher at .*nowhere.safetensors: give a .safetensors file"),
        ("folder.safetensors", "folder.safetensors is a folder, not a file: set `kind: folder`"),
        ("broken.safetensors", "broken.safetensors is not a safetensors file"),
    ],
)
def test_what_is_no_file_is_one_line(configurations: Path, tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"half a download")
    with pytest.raises(KoalaError, match=line):
        take(tmp_path / "out", path=tmp_path / name, config=configurations)
