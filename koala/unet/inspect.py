"""What a U-Net costs, stage by stage, beside SDXL's: parameters, FLOPs, attention layers.

    cost = inspect(SDXL, latent_size=128)
    cost.parameters, cost.flops, cost.stages["UP1"].self_attentions

All is counted on meta tensors, in seconds: no weights are read or downloaded.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from koala.errors import KoalaError
from koala.unet.blocks import keep, teacher_stages
from koala.unet.build import empty_unet, student_config
from koala.unet.reference import RULES, SDXL, TEXT_TOKENS, VAE_FACTOR
from koala.unet.weights import check, weight_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from koala.unet.blocks import StudentRule

OTHER = "other"
"""What belongs to no stage: the first and last convolution, the embeddings of time, size and crop."""


@dataclass(frozen=True)
class StageCost:
    """parameters; flops: of one forward pass of one image, a multiply-add counted as 2; self_attentions: layers."""

    parameters: int
    flops: int
    self_attentions: int


@dataclass(frozen=True)
class UNetCost:
    """The cost of each stage, in the order of the forward pass, and of what lies outside the stages (`other`, last)."""

    stages: dict[str, StageCost]

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages.values())

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages.values())

    @property
    def self_attentions(self) -> int:
        return sum(stage.self_attentions for stage in self.stages.values())


def inspect(unet_config: Mapping[str, Any], latent_size: int) -> UNetCost:
    """Count a U-Net of this UNet2DConditionModel configuration, for square latents of `latent_size` x `latent_size`.

    Raises KoalaError for a U-Net that is not of SDXL's shape.
    """
    unet = empty_unet(unet_config)
    flops = _forward_flops(unet, latent_size)
    stages = {}
    for stage in teacher_stages(unet.config):
        parameters = unet.get_submodule(stage.path).parameters()
        stages[stage.name] = StageCost(
            sum(tensor.numel() for tensor in parameters), flops.get(stage.path, 0), sum(stage.depths)
        )
    stages[OTHER] = StageCost(
        unet.num_parameters() - sum(stage.parameters for stage in stages.values()),
        flops[""] - sum(stage.flops for stage in stages.values()),
        0,
    )
    return UNetCost(stages)


def _forward_flops(unet: UNet2DConditionModel, latent_size: int) -> dict[str, int]:
    """FLOPs of one forward pass by module path; "" is the whole U-Net. Counted from the shapes, on the meta device."""
    config: Any = unet.config
    latents = torch.empty(1, config.in_channels, latent_size, latent_size, device="meta")
    text = torch.empty(1, TEXT_TOKENS, config.cross_attention_dim, device="meta")
    conditions = {}
    if config.addition_embed_type == "text_time":
        # The pooled text embedding is what the projection takes besides the six numbers of sizes and crop.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditions = {
            "text_embeds": torch.empty(1, pooled, device="meta"),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, torch.empty(1, device="meta"), text, added_cond_kwargs=conditions)
    root = type(unet).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(root)
    }


def show(target: str, size: int = 1024, as_json: bool = False, plot: Path | None = None) -> None:
    """What `koala inspect` prints: the cost of `target` beside SDXL's, for images of `size` x `size` pixels.

    target: a student of params.yaml or a known one (koala.unet.reference.RULES), applied to SDXL; or a local model
    folder, of which only configurations are read. as_json: print JSON and nothing else. plot: a file for a bar plot.
    Raises KoalaError for a target that is none of these, and for a size that the VAE cannot divide.
    """
    cost, sdxl = _cost_of(target, size), inspect(SDXL, _latent_size(size, VAE_FACTOR))
    name = Path(target).resolve().name
    if as_json:
        print(json.dumps({"target": target, "size": size, **_as_data(cost), "sdxl": _as_data(sdxl)}, indent=2))
    else:
        _print(name, size, cost, sdxl)
    if plot:
        _save(_figure(name, size, cost, sdxl), plot)


def _cost_of(target: str, size: int) -> UNetCost:
    if target in RULES:
        return _cost_of_student(RULES[target], size)
    if Path(target).is_dir():
        return _cost_of_folder(Path(target), size)
    from koala.config import load

    students = load().students
    if target not in students:
        known = ", ".join([*students, *RULES])
        raise KoalaError(f"{target!r} is neither a model folder nor a student: choose one of {known}, or name a folder")
    return _cost_of_student(students[target], size)


def _cost_of_student(rule: "StudentRule", size: int) -> UNetCost:
    stages = keep(SDXL, rule)
    config = student_config(SDXL, stages)
    shapes = empty_unet(config).state_dict()
    check(weight_map(stages, shapes), shapes, empty_unet(SDXL).state_dict())
    return inspect(config, _latent_size(size, VAE_FACTOR))


def _cost_of_folder(folder: Path, size: int) -> UNetCost:
    unet_file = folder / "unet" / "config.json" if (folder / "unet").is_dir() else folder / "config.json"
    vae_file = folder / "vae" / "config.json"
    config = _read_config(unet_file)
    factor = 2 ** (len(_read_config(vae_file)["block_out_channels"]) - 1) if vae_file.is_file() else VAE_FACTOR
    latent_size = _latent_size(size, factor)
    try:
        return inspect(config, latent_size)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise KoalaError(f"{unet_file} describes no U-Net of SDXL's kind: {error}") from None


def _latent_size(size: int, factor: int) -> int:
    if size < 1 or size % factor:
        raise KoalaError(f"--size {size}: must be a multiple of {factor} pixels")
    return size // factor


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise KoalaError(f"{file} is missing: name a folder that holds unet/config.json") from None
    except (OSError, ValueError) as error:
        raise KoalaError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or "block_out_channels" not in config:
        raise KoalaError(f"{file} is not the configuration of a diffusers model with blocks: name an SDXL-class folder")
    return config


def _as_data(cost: UNetCost) -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "self_attentions": cost.self_attentions,
        "stages": {name: asdict(stage) for name, stage in cost.stages.items()},
    }


def _rows(cost: UNetCost, sdxl: UNetCost) -> list[str]:
    """The stages of either, in the order of the forward pass."""
    names = {*cost.stages, *sdxl.stages}
    order = ("DW", "Mid", "UP", "other")
    return sorted(names, key=lambda name: (order.index(name.rstrip("123456789")), name))


def _print(name: str, size: int, cost: UNetCost, sdxl: UNetCost) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(_table(escape(name), size, cost, sdxl))
    for label, each in ((name, cost), ("SDXL", sdxl)):
        share, half = each.parameters / sdxl.parameters, each.parameters * 2 / 1e9
        line = f"{label}: {each.parameters:,} parameters ({share:.1%} of SDXL), {half:.2f} GB in half precision"
        console.print(line, markup=False, soft_wrap=True)


def _table(name: str, size: int, cost: UNetCost, sdxl: UNetCost) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=f"U-Net of {name} beside SDXL, one forward pass at {size} px", box=box.SIMPLE, show_footer=True)
    table.add_column("\nstage", footer="total")
    for label, each in (("", cost), ("SDXL", sdxl)):
        columns = {
            f"{label}\nparams (M)": f"{each.parameters / 1e6:.1f}",
            "\nshare": "100.0%",
            "\nTFLOP": f"{each.flops / 1e12:.3f}",
            "self-\nattn": str(each.self_attentions),
        }
        for header, footer in columns.items():
            table.add_column(header, footer, justify="right")
    for stage in _rows(cost, sdxl):
        table.add_row(stage, *_cells(stage, cost), *_cells(stage, sdxl))
    return table


def _cells(name: str, cost: UNetCost) -> tuple[str, str, str, str]:
    stage = cost.stages.get(name)
    if stage is None:
        return ("-",) * 4
    share = stage.parameters / cost.parameters
    return f"{stage.parameters / 1e6:.1f}", f"{share:.1%}", f"{stage.flops / 1e12:.3f}", str(stage.self_attentions)


def _figure(name: str, size: int, cost: UNetCost, sdxl: UNetCost) -> "Figure":
    """Two panels, parameters and FLOPs by stage, the target's bars beside SDXL's."""
    from matplotlib.figure import Figure

    stages = _rows(cost, sdxl)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {"parameters (M)": ("parameters", 1e6), f"TFLOP an image at {size} px": ("flops", 1e12)}
    for axes, (title, (what, unit)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for shift, (label, each, colour) in ((-0.2, ("SDXL", sdxl, "#b8bec6")), (0.2, (name, cost, "#2a6f97"))):
            heights = [getattr(each.stages[stage], what) / unit if stage in each.stages else 0 for stage in stages]
            total = getattr(each, what) / unit
            axes.bar(
                [i + shift for i in range(len(stages))], heights, 0.4, label=f"{label}: {total:,.4g}", color=colour
            )
        axes.set_xticks(range(len(stages)), stages)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _save(figure: "Figure", file: Path) -> None:
    from koala.console import say

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except ValueError:
        raise KoalaError(f"--plot {file}: name a .png, .svg or .pdf file") from None
    say(f"plot: {file}")
