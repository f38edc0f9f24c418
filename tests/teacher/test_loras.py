"""LoRAs: what is fused is W + weight * alpha / rank * up @ down, and what does not fit is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from koala.errors import KoalaError
from koala.run import NoRun
from koala.teacher import teacher as stage
from koala.teacher.config import FolderTeacher

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
UNET = "unet/diffusion_pytorch_model.safetensors"


def fuse(pipeline: Path, *loras: dict[str, Any]) -> Path:
    out = pipeline.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    stage.teacher(FolderTeacher(path=pipeline, loras=loras), out=out, run=NoRun())
    return out


def rank_two(weight: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Down and up of a LoRA for a weight of this shape: 2 x in, out x 2."""
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(2, weight.shape[1], generator=random) * 0.1
    return down, torch.randn(weight.shape[0], 2, generator=random) * 0.1


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}


def assert_only(changed: set[str], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.25])
def test_a_lora_under_diffusers_names(pipeline: Path, tmp_path: Path, weight: float) -> None:
    before = weights(pipeline, "unet")
    down, up = rank_two(before[f"{QUERY}.weight"])
    save_file({f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, tmp_path / "style.safetensors")
    out = fuse(pipeline, {"file": tmp_path / "style.safetensors", "weight": weight})
    after = weights(out, "unet")
    torch.testing.assert_close(
        after[f"{QUERY}.weight"], before[f"{QUERY}.weight"] + weight * up @ down, rtol=0, atol=1e-7
    )
    assert_only({f"{QUERY}.weight"}, before, after)
    for part in ("text_encoder", "text_encoder_2", "vae"):  # untouched, to the byte
        (file,) = (pipeline / part).glob("*.safetensors")
        assert (out / part / file.name).read_bytes() == file.read_bytes()
    assert (out / "unet/config.json").read_bytes() == (pipeline / "unet/config.json").read_bytes()
    StableDiffusionXLPipeline.from_pretrained(out, use_safetensors=True, local_files_only=True)


def kohya(pipeline: Path, alpha: float) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return a LoRA under kohya's names, and the change of each weight that it asks for at weight 1, by part."""
    tensors: dict[str, Tensor] = {}
    changes: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}

    def add(prefix: str, part: str, name: str, seed: int) -> None:
        down, up = rank_two(weights(pipeline, part)[name], seed)
        tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = down, up
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
        changes[part][name] = alpha / 2 * up @ down

    # The original numbering: the first transformer of the second level is input block 4, of the first way up output block 0.
    add("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "unet", f"{QUERY}.weight", 1)
    add(
        "lora_unet_output_blocks_2_1_transformer_blocks_1_attn2_to_v",
        "unet",
        "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_v.weight",
        2,
    )
    for prefix, part in (("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")):
        for layer in LAYERS:
            flat = layer.replace(".", "_")
            add(f"{prefix}_text_model_encoder_layers_1_{flat}", part, f"encoder.layers.1.{layer}.weight", len(tensors))
    return tensors, changes


def test_a_lora_under_kohyas_names_changes_the_text_encoders_too(pipeline: Path, tmp_path: Path) -> None:
    tensors, changes = kohya(pipeline, alpha=1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    out = fuse(pipeline, {"file": tmp_path / "kohya.safetensors", "weight": 0.8})
    for part, change in changes.items():
        before, after = weights(pipeline, part), weights(out, part)
        for name, delta in change.items():
            torch.testing.assert_close(after[name], before[name] + 0.8 * delta, rtol=0, atol=1e-7)
        assert_only(set(change), before, after)


def test_several_loras_add_up(pipeline: Path, tmp_path: Path) -> None:
    before = weights(pipeline, "unet")[f"{QUERY}.weight"]
    expected = before.clone()
    loras = []
    for seed, weight in enumerate((1.0, 0.5)):
        down, up = rank_two(before, seed)
        file = tmp_path / f"{seed}.safetensors"
        save_file({f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, file)
        loras.append({"file": file, "weight": weight})
        expected += weight * up @ down
    after = weights(fuse(pipeline, *loras), "unet")[f"{QUERY}.weight"]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-7)


def test_parts_keep_their_dtypes_and_shards_become_one_file(pipeline: Path, tmp_path: Path) -> None:
    loaded = StableDiffusionXLPipeline.from_pretrained(pipeline, use_safetensors=True)
    loaded.unet.to(torch.float16)
    loaded.text_encoder.to(torch.bfloat16)
    half = tmp_path / "half"
    loaded.save_pretrained(half, max_shard_size="100KB")
    assert len(list((half / "unet").glob("*.safetensors"))) > 1
    tensors, changes = kohya(pipeline, alpha=2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    out = fuse(half, {"file": tmp_path / "kohya.safetensors"})
    kinds = {"unet": torch.float16, "text_encoder": torch.bfloat16, "text_encoder_2": torch.float32}
    for part, kind in kinds.items():
        assert not list((out / part).glob("*.index.json"))
        after = weights(out, part)
        assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {kind}
        before = {name: tensor.to(kind) for name, tensor in weights(pipeline, part).items()}
        for name, delta in changes[part].items():
            eps = torch.finfo(kind).eps  # up and down are rounded once, the sum once
            torch.testing.assert_close(
                after[name].float(),
                before[name].float() + delta,
                rtol=eps,
                atol=eps * delta.abs().max().item() + 1e-7,
            )
        assert_only(set(changes[part]), before, after)


def lora(module: str, width: int = 32, value: float = 0.01) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.full((2, width), value), f"{module}.lora_B.weight": torch.ones(width, 2)}


def under_kohya(module: str, width: int = 32) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": torch.ones(2, width),
        f"{module}.lora_up.weight": torch.ones(width, 2),
        f"{module}.alpha": torch.tensor(1.0),
    }


SD_1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        (lora("unet.of.another.model"), "does not fit the model"),
        (lora("transformer.single.attn"), "none of the 1 modules of the LoRA"),
        (under_kohya(SD_1, 320), "does not fit the model"),
        (lora(f"unet.{QUERY}", width=320), "does not fit the model"),
        ({"model.weight": torch.zeros(2)}, "does not fit the model"),
        ({f"{SD_1}.hada_w1_a": torch.zeros(2, 2)}, "does not fit the model"),
        (under_kohya(SD_1) | {f"{SD_1}.dora_scale": torch.ones(32, 1)}, "is a DoRA"),
        (lora(f"unet.{QUERY}", value=float("nan")), "gives weights that are not finite"),
        (lora(f"unet.{QUERY}") | {f"unet.{QUERY}.lora_B.bias": torch.ones(32)}, "cannot be fused"),
    ],
)
def test_a_lora_that_does_not_fit_is_one_line(
    pipeline: Path, tmp_path: Path, tensors: dict[str, Tensor], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(KoalaError, match=line) as raised:
        fuse(pipeline, {"file": tmp_path / "lora.safetensors"})
    assert str(tmp_path / "lora.safetensors") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "unsuccessful" not in capfd.readouterr().err  # what diffusers says of it, in several lines


def test_keys_that_are_not_used_are_counted(pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(lora(f"unet.{QUERY}") | lora("unet.of.another.model"), tmp_path / "lora.safetensors")
    fuse(pipeline, {"file": tmp_path / "lora.safetensors"})
    assert "1 of 2 modules fused into unet" in capfd.readouterr().err


def test_a_lora_that_is_missing_or_broken_is_one_line(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lora.safetensors"
    with pytest.raises(KoalaError, match=r"there is no LoRA at .*lora.safetensors: correct `loras` of the teacher"):
        fuse(pipeline, {"file": file})
    assert not list((tmp_path / "out").iterdir())  # said before anything is fetched or copied
    file.write_bytes(b"half a download")
    with pytest.raises(KoalaError, match=r"lora\.safetensors is not a safetensors file"):
        fuse(pipeline, {"file": file})
    monkeypatch.setattr(stage, "find_spec", lambda _: None)
    with pytest.raises(KoalaError, match="needs peft, which is not installed: pip install peft"):
        fuse(pipeline, {"file": file})
