"""The ComfyUI workflow beside a single file, in ComfyUI's API format."""

from collections.abc import Mapping
from typing import Any

from koala.evaluate.config import SamplingConfig

_EULER = "euler"
_SAMPLERS = {
    "EulerDiscreteScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "uni_pc",
    "DDIMScheduler": "ddim",
    "LCMScheduler": "lcm",
}
"""ComfyUI's name of each of diffusers' schedulers; of others Euler stands in."""


def workflow(
    checkpoint: str,
    prompt: str,
    sampling: SamplingConfig,
    side: int,
    scheduler: Mapping[str, Any],
    zeros: bool = True,
) -> dict[str, Any]:
    """Return the graph that generates one image as the card's example does.

    Args:
        checkpoint: Name of the single file, as it lies in ComfyUI's models/checkpoints.
        prompt: The example's prompt.
        sampling: Its steps and guidance. Up to 1 there is no guidance, which ComfyUI calls 1.
        side: Of the image, in pixels.
        scheduler: Configuration of the pipeline's scheduler. With `timestep_spacing: trailing`, timesteps end at the last of the
            schedule.
        zeros: Whether the pipeline has zeros where the negative prompt is empty (`force_zeros_for_empty_prompt`), or its
            text states.
    """
    model, clip, vae = (["checkpoint", output] for output in range(3))
    zeroed = _node("ConditioningZeroOut", conditioning=["prompt", 0])
    trailing = scheduler.get("timestep_spacing") == "trailing"
    karras = bool(scheduler.get("use_karras_sigmas"))
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "prompt": _node("CLIPTextEncode", text=prompt, clip=clip),
        "negative": zeroed if zeros else _node("CLIPTextEncode", text="", clip=clip),
        "latent": _node("EmptyLatentImage", width=side, height=side, batch_size=1),
        "sample": _node(
            "KSampler",
            model=model,
            positive=["prompt", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=0,
            steps=sampling.steps,
            cfg=max(sampling.guidance, 1.0),
            sampler_name=_SAMPLERS.get(str(scheduler.get("_class_name")), _EULER),
            scheduler="karras" if karras else "sgm_uniform" if trailing else "normal",
            denoise=1.0,
        ),
        "image": _node("VAEDecode", samples=["sample", 0], vae=vae),
        "save": _node("SaveImage", images=["image", 0], filename_prefix=checkpoint.partition(".")[0]),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
