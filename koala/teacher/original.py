"""The original layout of SDXL: the name and the form that each tensor of a pipeline has in a single file.

Blocks are numbered from the U-Net's configuration, so that a student with fewer pairs a stage has no gap. One description
serves both ways: `Place.write` gives the file's tensor, `Place.read` the pipeline's.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from koala.teacher.open_clip import OPEN_CLIP_TEXT, Place, open_clip
from koala.unet.blocks import MID, Stage, teacher_stages

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""What the names of each part begin with."""

POSITION_IDS = f"{PREFIXES['text_encoder']}embeddings.position_ids"
"""CLIP-L's positions, a constant that the original layout holds."""


def places(part: str, config: Mapping[str, Any]) -> Callable[[str], Place | None]:
    """Return the function from a tensor's name in `part` to its place in a single file; None: the file has no such tensor.

    config: the part's configuration.
    """
    prefix = PREFIXES[part]
    if part == "unet":
        blocks = unet_blocks(config)
        return lambda name: Place(prefix + _unet(name, blocks))
    if part == "vae":
        levels = len(config["up_block_types"])
        return lambda name: _vae(name, prefix, levels)
    return _clip_l if part == "text_encoder" else _clip_g


_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+")


def unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the original name of each residual block, transformer and resampler of a U-Net, and of what stands outside them.

    config: a UNet2DConditionModel configuration. Raises KoalaError where the U-Net is not of SDXL's shape.
    """
    stages = teacher_stages(config)
    down = [stage for stage in stages if stage.path.startswith("down")]
    up = [stage for stage in stages if stage.path.startswith("up")]
    found = dict(_UNET_OUTSIDE)
    block = 1  # input block 0 is conv_in
    for stage in down:
        for pair, depth in enumerate(stage.depths):
            found |= _pair(stage, pair, depth, f"input_blocks.{block}")
            block += 1
        if stage is not down[-1]:
            found[f"{stage.path}.downsamplers.0"] = f"input_blocks.{block}.0"
            block += 1
    for stage in stages:
        if stage.path == MID:
            found |= _pair(stage, 0, stage.depths[0], "middle_block")
            if stage.depths[0]:  # without a transformer, diffusers' mid block is one residual block
                found[f"{MID}.resnets.1"] = "middle_block.2"
    block = 0
    for stage in up:
        for pair, depth in enumerate(stage.depths):
            found |= _pair(stage, pair, depth, f"output_blocks.{block}")
            block += 1
        if stage is not up[-1]:  # behind the last pair's transformer, if it has one
            found[f"{stage.path}.upsamplers.0"] = f"output_blocks.{block - 1}.{2 if stage.depths[-1] else 1}"
    return found


def _pair(stage: Stage, pair: int, depth: int, block: str) -> dict[str, str]:
    resnet = {f"{stage.path}.resnets.{pair}": f"{block}.0"}
    return resnet | ({f"{stage.path}.attentions.{pair}": f"{block}.1"} if depth else {})


def _unet(name: str, blocks: Mapping[str, str]) -> str:
    """Return the original name of a U-Net's tensor; KeyError: the configuration has no such block."""
    if match := _BLOCK.match(name):
        block, rest = blocks[match[0]], name[match.end() + 1 :]
        if match[2] == "resnets":
            layer, _, kind = rest.partition(".")
            return f"{block}.{_RESNET[layer]}.{kind}"
        return f"{block}.{rest.replace('conv.', 'op.') if match[2] == 'downsamplers' else rest}"
    module, _, kind = name.rpartition(".")
    return f"{blocks[module]}.{kind}"


# The second names are those of diffusers before 0.17, which files on the Hub still have.
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "query": "q",
    "to_k": "k",
    "key": "k",
    "to_v": "v",
    "value": "v",
    "to_out.0": "proj_out",
    "proj_attn": "proj_out",
}


def _vae(name: str, prefix: str, levels: int) -> Place:
    """Return the place of a VAE's tensor; the file counts the levels of the decoder from the image on."""
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        layer = _VAE_ATTENTION[match[2]]
        matrix = layer != "norm" and match[3] == "weight"
        return Place(
            f"{prefix}{match[1]}.mid.attn_1.{layer}.{match[3]}",
            "convolution" if matrix else "same",
        )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"\.resnets\.(\d+)", r".block.\1", name)
    name = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", name)
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return Place(prefix + name)


def _clip_l(name: str) -> Place | None:
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else Place(PREFIXES["text_encoder"] + name)


def _clip_g(name: str) -> Place | None:
    """Return the place of a tensor of CLIP-G: the file has open_clip's names."""
    name = name.removeprefix("text_model.")
    if name == "embeddings.position_ids":
        return None
    return open_clip(name, PREFIXES["text_encoder_2"], OPEN_CLIP_TEXT)
