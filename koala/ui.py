"""The command `koala ui`: a page on loopback that generates a prompt's image by several models side by side."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.console import say
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.generate import device
from koala.sheet import Request, check, draw, open_model
from koala.teacher.config import LoraPart

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

HOST = "127.0.0.1"
_STEPS, _GUIDANCE = 100, 20.0  # the sliders' ends
_HEIGHT = 480  # px of an image on the page
_STYLE = """
footer { display: none !important; }
.image-frame img { width: 100%; height: 100%; object-fit: contain; }
"""


def serve(
    models: Sequence[str],
    sampling: SamplingConfig,
    port: int,
    loras: Sequence[LoraPart] = (),
    base: str | None = None,
    dtype: str | None = None,
) -> None:
    """Load all models, and serve the page until interrupted.

    Raises:
        KoalaError: gradio is not installed, a model or a LoRA cannot be loaded, or the port is in use.
    """
    check(models, loras, base, dtype)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise KoalaError("`koala ui` needs gradio: pip install 'koala[ui]'") from None
    opened = {}
    for model in models:
        say(f"Loading {model}")
        opened[model] = open_model(model, loras, base, dtype)
    try:
        build(opened, sampling).launch(server_name=HOST, server_port=port, share=False, quiet=True, **_look())
    except OSError:
        raise KoalaError(f"port {port} is in use: choose another (--port)") from None


def build(models: "Mapping[str, StableDiffusionXLPipeline]", sampling: SamplingConfig) -> Any:
    """Return the page (gradio.Blocks): a prompt and its settings, and an image of each model."""
    import gradio

    def generate(*values: Any) -> Iterator[list[Any]]:
        try:
            yield from _images(models, _request(*values))
        except KoalaError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(title="koala") as page:
        prompt = gradio.Textbox(label="Prompt", value=next(iter(sampling.prompts), ""), autofocus=True)
        negative = gradio.Textbox(label="Negative prompt")
        with gradio.Row():
            seed = gradio.Number(label="Seed", value=0, precision=0)
            steps = gradio.Slider(1, _STEPS, sampling.steps, step=1, label="Steps")
            guidance = gradio.Slider(0.0, _GUIDANCE, sampling.guidance, step=0.5, label="Guidance")
        button = gradio.Button("Generate", variant="primary")
        outputs: list[Any] = []
        with gradio.Row():
            for model in models:
                with gradio.Column():
                    name = "/".join(Path(model).parts[-2:])
                    buttons: Any = ["download", "fullscreen"]
                    # Above the image, where it is seen without scrolling.
                    took = gradio.Textbox(show_label=False, interactive=False, container=False)
                    image = gradio.Image(label=name, format="png", interactive=False, height=_HEIGHT, buttons=buttons)
                    outputs += [image, took]
        inputs = [prompt, negative, seed, steps, guidance]
        gradio.on([button.click, prompt.submit], generate, inputs, outputs, api_name="generate")
    return page


def _look() -> dict[str, Any]:
    """Return a theme whose fonts are the reader's own: the page fetches none."""
    import gradio

    fonts = ["system-ui", "sans-serif"]
    return {"theme": gradio.themes.Base(font=fonts, font_mono=["monospace"]), "css": _STYLE}


def _request(prompt: str, negative: str, seed: float, steps: int, guidance: float) -> Request:
    if not prompt.strip():
        raise KoalaError("write a prompt first")
    return Request(prompt, int(seed), 1, SamplingConfig(steps=steps, guidance=guidance), negative or None)


def _images(models: "Mapping[str, StableDiffusionXLPipeline]", request: Request) -> Iterator[list[Any]]:
    """Yield each model's image and what it took, as soon as there is one; the other places are empty."""
    found: list[Any] = [None, ""] * len(models)
    for place, (model, pipeline) in enumerate(models.items()):
        found[2 * place + 1] = "generating ..."
        yield found
        _reset_peak()
        begun = time.perf_counter()
        (image,) = draw(pipeline, request, f"generate {model}")
        found[2 * place : 2 * place + 2] = [image, f"{time.perf_counter() - begun:.2f} s, {_memory(pipeline)}"]
        yield found


def _reset_peak() -> None:
    """Start to measure a GPU's memory anew."""
    import torch

    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _memory(pipeline: "StableDiffusionXLPipeline") -> str:
    """Return in words the memory of the weights and, on a GPU, the most that was used beside the other models."""
    import torch

    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(each.numel() * each.element_size() for part in models for each in part.parameters())
    words = f"{weights / 1e9:.2f} GB of weights"
    if device().type == "cuda":
        others = torch.cuda.memory_allocated() - weights
        words += f", {(torch.cuda.max_memory_allocated() - others) / 1e9:.2f} GB at most"
    return words
