"""Teachers that koala would misread: refused in one line, before they are used.

Distillation compares noise or velocity (Salimans and Ho 2022, appendix D) at the timesteps of a schedule of betas.
Another parametrisation would load without an error and train a student that is wrong.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from koala.errors import KoalaError, line_of
from koala.teacher.config import SAFETENSORS
from koala.teacher.embedded import empty_model
from koala.teacher.layout import MODELS, check_vocabularies, is_index, read_index, read_shards
from koala.teacher.original import places
from koala.teacher.shape import read_json
from koala.unet.blocks import teacher_stages

PREDICTIONS = ("epsilon", "v_prediction")


def check_configurations(folder: Path, origin: str) -> None:
    """Raise KoalaError if the pipeline whose configurations lie in `folder` is not one that koala can distil.

    origin: what the teacher is called in the message.
    """
    parts = read_index(folder, origin)
    _check_scheduler(folder, origin, parts["scheduler"][1])
    vae = read_json(folder / "vae" / "config.json")
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise KoalaError(
            f"{origin}: its VAE has latents_mean and latents_std, where koala scales latents by scaling_factor alone: "
            "choose a teacher with SDXL's VAE"
        )
    _check_unet(folder, origin, vae.get("latent_channels", 4))
    check_vocabularies(folder, origin)


def _check_scheduler(folder: Path, origin: str, kind: str) -> None:
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    only = "koala distils only epsilon and v_prediction with beta_start, beta_end and beta_schedule: choose another teacher"
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas") or prediction == "flow_prediction":
        raise KoalaError(f"{origin}: its scheduler, {kind}, is for flow matching, where {only}")
    if kind.startswith("EDM") or not all(f"beta_{name}" in config for name in ("start", "end", "schedule")):
        raise KoalaError(f"{origin}: its scheduler, {kind}, has no schedule of betas (EDM's noise?), where {only}")
    if prediction not in PREDICTIONS:
        raise KoalaError(f"{origin}: its scheduler's prediction_type is {prediction}, where {only}")
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise KoalaError(
            f"{origin}: its scheduler has rescale_betas_zero_snr with epsilon, where the last timestep is noise alone and "
            "says nothing of the image: set `scheduler: {rescale_betas_zero_snr: false}`, or "
            "`{prediction_type: v_prediction}` if it is trained so"
        )
    _try_scheduler(config, origin, kind)


def _try_scheduler(config: dict[str, Any], origin: str, kind: str) -> None:
    """Raise KoalaError where diffusers cannot sample by a scheduler of this configuration, or add noise by its betas."""
    import diffusers

    try:
        diffusers.DDPMScheduler.from_config(config)  # of distillation
        getattr(diffusers, kind).from_config(config).set_timesteps(4)
    except Exception as error:  # a class that is none, a library that is not installed, values of any kind
        raise KoalaError(
            f"{origin}: its scheduler, {kind}, cannot be used ({line_of(error)}): correct it, or give other values under "
            "`scheduler`"
        ) from None


def _check_unet(folder: Path, origin: str, latent_channels: int) -> None:
    config = read_json(folder / "unet" / "config.json")
    try:
        teacher_stages(config)
    except KoalaError as error:
        raise KoalaError(f"{origin}: {error}") from None
    except KeyError as error:
        raise KoalaError(f"{origin}: its U-Net's config.json has no {error}: restore it") from None
    except (TypeError, IndexError) as error:
        raise KoalaError(f"{origin}: its U-Net's config.json gives no U-Net ({error}): restore it") from None
    if config.get("addition_embed_type") != "text_time":
        raise KoalaError(
            f"{origin}: its U-Net's addition_embed_type is {config.get('addition_embed_type')}, where SDXL's is text_time: "
            "choose a teacher of SDXL's kind"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise KoalaError(
            f"{origin}: its U-Net takes the guidance as an input (time_cond_proj_dim, as LCM has it), which koala does not "
            "give: choose another teacher"
        )
    channels = {config.get("in_channels", 4), config.get("out_channels", 4)}
    if channels != {latent_channels}:
        raise KoalaError(
            f"{origin}: its U-Net takes {config.get('in_channels', 4)} channels, gives {config.get('out_channels', 4)}, and "
            f"its VAE's latents have {latent_channels} (an inpainting model?): choose a text-to-image teacher"
        )
    texts = [read_json(folder / name / "config.json") for name in ("text_encoder", "text_encoder_2")]
    width = sum(text.get("hidden_size", 512) for text in texts)
    if config.get("cross_attention_dim") != width:
        raise KoalaError(
            f"{origin}: its U-Net attends to {config.get('cross_attention_dim')} numbers a token, where both text encoders "
            f"give {width} (a refiner?): choose a teacher of SDXL base's kind"
        )


def check_weights(folder: Path, origin: str) -> None:
    """Raise KoalaError if a part in `folder` has no weights, or lacks a shard or a tensor that its configuration asks for.

    diffusers and transformers would go on with random numbers in place of a tensor, of which no later stage knows.
    """
    for part in MODELS:
        files = sorted(file.name for file in (folder / part).iterdir())
        if not any(file.endswith(SAFETENSORS) for file in files):
            raise KoalaError(f"{origin}: {part} has no safetensors: give a pipeline with all of its weights")
        for index in filter(is_index, files):
            shards = set(read_shards(folder / part / index).values())
            if missing := shards.difference(files):
                raise KoalaError(f"{origin}: {part} lacks {min(missing)}, which its {index} names: fetch it again")
        _check_tensors(folder / part, part, origin)


def _check_tensors(folder: Path, part: str, origin: str) -> None:
    """Raise KoalaError where the weights in a part's folder lack a tensor of its model, under whatever names diffusers reads."""
    config = read_json(folder / "config.json")
    try:
        place, wanted = places(part, config), empty_model(part, config).state_dict()
    except KoalaError:
        raise
    except Exception as error:  # diffusers and transformers check little of a configuration
        raise KoalaError(
            f"{origin}: the config.json of its {part} gives no model ({line_of(error)}): restore it"
        ) from None
    there = set()
    for file in folder.glob(f"*{SAFETENSORS}"):
        for name in _names(file, origin):
            with suppress(KeyError):  # a name that this model does not have
                there.add(place(name))
    if missing := [name for name in wanted if place(name) not in there]:
        raise KoalaError(
            f"{origin}: the weights of its {part} lack {len(missing)} of {len(wanted)} tensors, such as {min(missing)}: "
            "give weights under diffusers' names, whole"
        )


def _names(file: Path, origin: str) -> list[str]:
    """Return the names of the tensors in a file, which is read no further."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise KoalaError(
            f"{origin}: {file.parent.name}/{file.name} is not a safetensors file ({error}): fetch it again"
        ) from None
