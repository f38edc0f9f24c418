"""The ComfyUI workflow beside a single file, in ComfyUI's API format."""

from typing import Any

from koala.evaluate.config import SamplingConfig


def workflow(checkpoint: str, prompt: str, sampling: SamplingConfig, side: int, trailing: bool) -> dict[str, Any]:
    """Return the graph that generates one image as the card's example does.

    Args:
        checkpoint: Name of the single file, as it lies in ComfyUI's models/checkpoints.
        prompt: The example's prompt.
        sampling: Its steps and guidance. Up to 1 there is no guidance, which ComfyUI calls 1.
        side: Of the image, in pixels.
        trailing: Whether timesteps end at the last of the schedule (`timestep_spacing: trailing`).
    """
    model, clip, vae = (["checkpoint", output] for output in range(3))
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "prompt": _node("CLIPTextEncode", text=prompt, clip=clip),
        # SDXL's pipeline has zeros where the negative prompt is empty.
        "negative": _node("ConditioningZeroOut", conditioning=["prompt", 0]),
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
            sampler_name="euler",
            scheduler="sgm_uniform" if trailing else "normal",
            denoise=1.0,
        ),
        "image": _node("VAEDecode", samples=["sample", 0], vae=vae),
        "save": _node("SaveImage", images=["image", 0], filename_prefix=checkpoint.partition(".")[0]),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
