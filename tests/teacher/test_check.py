"""Teachers that koala would misread: each is refused, in one line that says what, where, and what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from koala.errors import KoalaError
from koala.run import NoRun
from koala.teacher.config import FolderTeacher
from koala.teacher.teacher import teacher

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def edit(file: Path, **changes: Any) -> None:
    """Set values of a JSON file; None removes one, and "null" sets null."""
    content = json.loads(file.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps({name: None if value == "null" else value for name, value in content.items()}))


def refusal(folder: Path, **options: Any) -> str:
    """Return the line with which the folder is refused as a teacher."""
    out = folder.parent / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(KoalaError) as raised:
        teacher(FolderTeacher(path=folder, **options), out=out, run=NoRun())
    line = str(raised.value)
    assert "\n" not in line
    assert not (out / "model_index.json").exists()
    return line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"prediction_type": "sample"},
            "its scheduler's prediction_type is sample, where koala distils only epsilon and",
        ),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with epsilon"),
        ({"rescale_betas_zero_snr": True, "prediction_type": None}, "rescale_betas_zero_snr with epsilon"),
        ({"beta_start": None}, "has no schedule of betas"),
        ({"use_flow_sigmas": True}, "is for flow matching"),
        ({"prediction_type": "flow_prediction"}, "is for flow matching"),
    ],
)
def test_schedulers_of_another_kind_are_refused(pipeline: Path, changes: dict[str, Any], line: str) -> None:
    edit(pipeline / "scheduler/scheduler_config.json", **changes)
    said = refusal(pipeline)
    assert said.startswith(f"{pipeline}: its scheduler")
    assert line in said
    assert "choose another teacher" in said or "set `scheduler: {" in said


@pytest.mark.parametrize(
    ("scheduler", "line"), [(EDM, "EDMEulerScheduler, has no schedule of betas"), (FLOW, "flow matching")]
)
def test_schedulers_of_another_class_are_refused(pipeline: Path, scheduler: dict[str, Any], line: str) -> None:
    edit(pipeline / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    (pipeline / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    assert line in refusal(pipeline)
    # Flow matching with betas in its configuration is flow matching all the same.
    (pipeline / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | BETAS))
    assert "koala distils only epsilon and v_prediction" in refusal(pipeline)


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "exp is not implemented"),
        ("DPMSolverSDEScheduler", {}, "requires the torchsde library"),
        ("ASchedulerOfTheirOwn", {}, "ASchedulerOfTheirOwn"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trialing"}, "trialing is not supported"),
        ("EulerDiscreteScheduler", {"num_train_timesteps": "1000"}, "linspace"),
    ],
)
def test_schedulers_that_cannot_be_used_are_refused(
    pipeline: Path, kind: str, changes: dict[str, Any], line: str
) -> None:
    """They would fail hours later: where training starts, or where images are generated."""
    edit(pipeline / "model_index.json", scheduler=["diffusers", kind])
    edit(pipeline / "scheduler/scheduler_config.json", _class_name=kind, **changes)
    said = refusal(pipeline)
    assert f"its scheduler, {kind}, cannot be used (" in said
    assert line in said


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": None},
    ],
)
def test_v_prediction_is_taken_also_with_zero_terminal_snr(
    pipeline: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    edit(pipeline / "scheduler/scheduler_config.json", **changes)
    (tmp_path / "out").mkdir()
    teacher(FolderTeacher(path=pipeline), out=tmp_path / "out", run=NoRun())
    assert (tmp_path / "out/model_index.json").is_file()


def test_the_scheduler_is_judged_as_the_parameters_change_it(pipeline: Path, tmp_path: Path) -> None:
    edit(pipeline / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    assert "epsilon" in refusal(pipeline)
    (tmp_path / "whole").mkdir()
    config = FolderTeacher(path=pipeline, scheduler={"prediction_type": "v_prediction"})
    teacher(config, out=tmp_path / "whole", run=NoRun())
    assert '"v_prediction"' in (tmp_path / "whole/scheduler/scheduler_config.json").read_text()


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_a_vae_with_statistics_of_each_channel_is_refused(pipeline: Path, name: str) -> None:
    edit(pipeline / "vae/config.json", **{name: [0.1, 0.2, 0.3, 0.4]})
    assert "its VAE has latents_mean and latents_std" in refusal(pipeline)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "a block of type AttnDownBlock2D"),
        ({"addition_embed_type": "null"}, "addition_embed_type is None, where SDXL's is text_time"),
        ({"time_cond_proj_dim": 256}, "takes the guidance as an input"),
        ({"in_channels": 9}, "takes 9 channels, gives 4, and its VAE's latents have 4 (an inpainting model?)"),
        ({"cross_attention_dim": 32}, "attends to 32 numbers a token, where both text encoders give 64 (a refiner?)"),
        ({"down_block_types": None}, "its U-Net's config.json has no 'down_block_types'"),
        ({"layers_per_block": "null"}, "its U-Net's config.json gives no U-Net"),
    ],
)
def test_unets_of_another_shape_are_refused(pipeline: Path, changes: dict[str, Any], line: str) -> None:
    edit(pipeline / "unet/config.json", **changes)
    assert line in refusal(pipeline)


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [None, [None, None]])
def test_a_part_that_the_index_lacks_is_named(pipeline: Path, part: str, value: Any) -> None:
    edit(pipeline / "model_index.json", **{part: value})
    assert f"model_index.json names no {part}: a teacher must be a pipeline of SDXL's kind" in refusal(pipeline)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"unet": ["my_unet", "MyUNet"]},
            "unet is of my_unet, code that comes with the pipeline and that koala never runs",
        ),
        ({"extra": ["stable_diffusion", "Extra"]}, "extra is of stable_diffusion, code"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "its vae is a AutoencoderTiny"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, "its text_encoder_2 is a T5EncoderModel"),
    ],
)
def test_other_classes_and_code_are_refused(pipeline: Path, changes: dict[str, Any], line: str) -> None:
    edit(pipeline / "model_index.json", **changes)
    (pipeline / "my_unet.py").write_text("raise SystemExit")
    assert line in refusal(pipeline)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_that_is_missing_or_broken_is_named(pipeline: Path, file: str) -> None:
    (pipeline / file).write_text("{")
    assert f"{file} cannot be read" in refusal(pipeline)
    (pipeline / file).write_text("[]")
    assert f"{file} holds no mapping" in refusal(pipeline)
    (pipeline / file).unlink()
    assert f"{file} is missing: a teacher is a whole pipeline" in refusal(pipeline)


def test_a_tokenizer_without_words_is_named(pipeline: Path) -> None:
    for file in (pipeline / "tokenizer_2").iterdir():
        file.unlink()
    assert "tokenizer_2 has no vocabulary (vocab.json or tokenizer.json)" in refusal(pipeline)


@pytest.mark.parametrize(
    ("part", "file"), [("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder_2", "model.safetensors")]
)
def test_pickles_are_refused_and_missing_weights_named(pipeline: Path, part: str, file: str) -> None:
    (pipeline / part / file).rename(pipeline / part / "pytorch_model.bin")
    assert f"{part} is there only as a pickle, which koala never opens: convert it to safetensors" in refusal(pipeline)
    (pipeline / part / "pytorch_model.bin").unlink()
    assert f"{part} has no {file}" in refusal(pipeline)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("text_encoder_2", "model.safetensors"),
    ],
)
def test_weights_that_lack_tensors_are_refused(pipeline: Path, part: str, file: str) -> None:
    """diffusers and transformers put random numbers in their place."""
    weights = pipeline / part / file
    tensors = load_file(weights)
    # A VAE in its original layout has such names. All of its tensors are missing then.
    save_file({f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}, weights)
    assert f"the weights of its {part} lack " in refusal(pipeline)
    one = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != one}, weights)
    said = refusal(pipeline)
    assert f"the weights of its {part} lack 1 of {len(tensors)} tensors, such as " in said
    assert one.removeprefix("text_model.") in said


def test_a_vae_under_the_names_of_early_diffusers_is_whole(pipeline: Path, tmp_path: Path) -> None:
    weights = pipeline / "vae/diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(weights).items():
        for new, old in early.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in renamed
    save_file(renamed, weights)
    (tmp_path / "out").mkdir()
    teacher(FolderTeacher(path=pipeline), out=tmp_path / "out", run=NoRun())
    assert (tmp_path / "out/model_index.json").is_file()


def test_weights_that_are_cut_off_are_refused(pipeline: Path) -> None:
    weights = pipeline / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "vae/diffusion_pytorch_model.safetensors is not a safetensors file" in refusal(pipeline)
