"""Shape of a teacher: what other stages need to know before its weights are read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala.errors import KoalaError
from koala.unet.reference import SDXL, TEXT_TOKENS, VAE_FACTOR

SDXL_TEXT_PARAMETERS = 123_060_480 + 694_659_840
"""Parameters of CLIP-L and of CLIP-G with its projection."""


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a pipeline of SDXL's kind.

    unet: the UNet2DConditionModel configuration. latent_factor: pixels of an image per pixel of its latent, a side.
    tokens: tokens of a prompt. text_parameters: parameters of both text encoders.
    """

    unet: Mapping[str, Any]
    latent_factor: int
    tokens: int
    text_parameters: int


SDXL_SHAPE = TeacherShape(SDXL, VAE_FACTOR, TEXT_TOKENS, SDXL_TEXT_PARAMETERS)


def shape_of(folder: Path) -> TeacherShape:
    """Return the shape of a pipeline folder, from its JSON configurations.

    Raises KoalaError if one of them is missing or is not JSON.
    """
    return shape_from(lambda name: read_json(folder / name / "config.json"))


def shape_from(configuration: Callable[[str], Mapping[str, Any]]) -> TeacherShape:
    """Return the shape of a pipeline, from a function that gives the configuration of each part."""
    vae, text, text_2 = map(configuration, ("vae", "text_encoder", "text_encoder_2"))
    return TeacherShape(
        unet=configuration("unet"),
        latent_factor=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
        tokens=text.get("max_position_embeddings", TEXT_TOKENS),
        text_parameters=clip_parameters(text) + clip_parameters(text_2, projection=True),
    )


def clip_parameters(config: Mapping[str, Any], projection: bool = False) -> int:
    """Return the parameter count of a CLIP text encoder, from its CLIPTextConfig; defaults are transformers' own."""
    width, inner = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * inner + inner + width
    norm = 2 * width
    embeddings = (config.get("vocab_size", 49408) + config.get("max_position_embeddings", 77)) * width
    layers = config.get("num_hidden_layers", 12) * (attention + feed_forward + 2 * norm)
    return int(embeddings + layers + norm + (width * config.get("projection_dim", 512) if projection else 0))


def read_json(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file. Raises KoalaError, in one line, if the file is missing or holds something else."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise KoalaError(f"{file} is missing: a teacher is a whole pipeline folder of SDXL's layout") from None
    except (OSError, ValueError) as error:
        raise KoalaError(f"{file} cannot be read ({error}): restore it") from None
    if not isinstance(found, dict):
        raise KoalaError(f"{file} holds no mapping: restore it")
    return found
