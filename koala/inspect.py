"""The command `koala inspect`: the cost of a U-Net beside SDXL's, and the memory that distilling a student takes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from koala.console import say, show
from koala.errors import KoalaError
from koala.params import Params, load
from koala.unet.blocks import StudentRule, keep
from koala.unet.reference import RULES, SDXL, VAE_FACTOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from koala.unet.cost import UNetCost


def inspect(target: str, size: int = 1024, as_json: bool = False, plot: Path | None = None) -> None:
    """Show the cost of `target` beside SDXL's, for images of `size` x `size` pixels.

    `target` is a student of params.yaml or a known one (koala.unet.reference.RULES), applied to SDXL; or a local model
    folder, of which only configurations are read. `plot` is a file for a bar plot. Raises KoalaError for a target that is
    none of these, and for a size that the VAE cannot divide.
    """
    rule = rule_of(target)
    from koala.unet.cost import student_cost, unet_cost

    latent_size = _latent_size(size, VAE_FACTOR)
    cost = student_cost(SDXL, rule, latent_size) if rule else _cost_of_folder(Path(target), size)
    sdxl = unet_cost(SDXL, latent_size)
    name = Path(target).resolve().name
    if as_json:
        show(json.dumps({"target": target, "size": size, **_as_data(cost), "sdxl": _as_data(sdxl)}, indent=2))
    else:
        _print(name, size, cost, sdxl)
    if plot:
        _save(_figure(name, size, cost, sdxl), plot)


def inspect_training(student: str, profile: str | None, machine: str | None, as_json: bool) -> None:
    """Show the memory that distilling `student` takes. Raises KoalaError for an unknown student, profile or machine."""
    params = load(profile=profile, machine=machine)
    config = params.distill(student)
    from koala.distill.memory import CARDS, GIB, advice, estimate_for

    teacher = params.recipe.teacher.shape()
    bucket = max(params.recipe.encode.buckets, key=lambda sides: sides[0] * sides[1])
    found = estimate_for(config, teacher, keep(teacher.unet, params.student(student).unet), bucket)
    if as_json:
        fits = {str(card): found.total <= card * GIB for card in CARDS}
        names = {"student": student, "profile": params.profile, "machine": params.machine}
        show(json.dumps({**names, **asdict(found), "total": found.total, "fits_gib": fits}))
        return
    table = Table(box=box.SIMPLE, show_footer=True)
    table.add_column("what", footer="total")
    table.add_column("GiB", footer=f"{found.total / GIB:.2f}", justify="right")
    for name, size in found.parts().items():
        table.add_row(name.replace("_", " "), f"{size / GIB:.2f}")
    settings = config.machine
    # A tenth stays for CUDA itself and for fragmentation.
    smallest = next((card for card in CARDS if found.total * 1.1 <= card * GIB), None)
    console = Console(highlight=False)
    console.print(_title(student, params), soft_wrap=True)
    console.print(table)
    console.print(f"{found.host / GIB:.2f} GiB of the host's memory", soft_wrap=True)
    console.print(
        f"micro_batch {settings.micro_batch}, gradient_checkpointing {settings.gradient_checkpointing}, "
        f"optimizer {config.optimizer}, teacher_dtype {config.teacher_dtype}, {settings.launch}",
        soft_wrap=True,
    )
    fits_text = f"fits a card of {smallest} GiB" if smallest else f"fits no common card: {advice(config)}"
    console.print(fits_text, soft_wrap=True)


def _title(student: str, params: Params) -> str:
    return f"Memory of training {student} at profile {params.profile} on machine {params.machine}, one device"


def rule_of(target: str) -> StudentRule | None:
    """Return the rule that a name stands for; None for a folder. Raises KoalaError where it is neither."""
    if target in RULES:
        return RULES[target]
    if Path(target).is_dir():
        return None
    students = load().students
    if target not in students:
        known = ", ".join([*students, *RULES])
        raise KoalaError(f"{target!r} is neither a model folder nor a student: choose one of {known}, or name a folder")
    return students[target].unet


def _cost_of_folder(folder: Path, size: int) -> "UNetCost":
    from koala.unet.cost import unet_cost

    unet_file = folder / "unet" / "config.json" if (folder / "unet").is_dir() else folder / "config.json"
    vae_file = folder / "vae" / "config.json"
    config = _read_config(unet_file)
    factor = 2 ** (len(_read_config(vae_file)["block_out_channels"]) - 1) if vae_file.is_file() else VAE_FACTOR
    latent_size = _latent_size(size, factor)
    try:
        return unet_cost(config, latent_size)
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


def _as_data(cost: "UNetCost") -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "self_attentions": cost.self_attentions,
        "stages": {name: asdict(stage) for name, stage in cost.stages.items()},
    }


def _rows(cost: "UNetCost", sdxl: "UNetCost") -> list[str]:
    """Return the stages of either, in the order of the forward pass."""
    names = {*cost.stages, *sdxl.stages}
    order = ("DW", "Mid", "UP", "other")
    return sorted(names, key=lambda name: (order.index(name.rstrip("123456789")), name))


def _print(name: str, size: int, cost: "UNetCost", sdxl: "UNetCost") -> None:
    console = Console(highlight=False)
    console.print(_table(escape(name), size, cost, sdxl))
    for label, each in ((name, cost), ("SDXL", sdxl)):
        share, half = each.parameters / sdxl.parameters, each.parameters * 2 / 1e9
        line = f"{label}: {each.parameters:,} parameters ({share:.1%} of SDXL), {half:.2f} GB in half precision"
        console.print(line, markup=False, soft_wrap=True)


def _table(name: str, size: int, cost: "UNetCost", sdxl: "UNetCost") -> Table:
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


def _cells(name: str, cost: "UNetCost") -> tuple[str, str, str, str]:
    stage = cost.stages.get(name)
    if stage is None:
        return ("-",) * 4
    share = stage.parameters / cost.parameters
    return f"{stage.parameters / 1e6:.1f}", f"{share:.1%}", f"{stage.flops / 1e12:.3f}", str(stage.self_attentions)


def _figure(name: str, size: int, cost: "UNetCost", sdxl: "UNetCost") -> "Figure":
    """Plot two panels, parameters and FLOPs by stage, the target's bars beside SDXL's."""
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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except ValueError:
        raise KoalaError(f"--plot {file}: name a .png, .svg or .pdf file") from None
    say(f"plot: {file}")
