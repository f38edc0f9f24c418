"""`koala bench train`: a step of distillation as koala takes it, beside the plain recipe's, on random weights.

Both distil the same student from the same teacher with the same batch. Ours is what `koala distill` runs: its loader over
encoded samples on disk, its task and its Trainer. A step is timed after warm-up. What it computes is counted as one forward
pass of the teacher and three of the student (backward is two), whatever is computed twice or beside that.
"""

from pathlib import Path
from typing import Any

from koala.bench import report, runner
from koala.console import progress, say
from koala.distill.launch_settings import micro_batch
from koala.params import load
from koala.requirements import check

OURS = "koala"
_SWITCHES = ("channels_last", "gradient_checkpointing", "deterministic")  # what --ablate turns, one by one


def bench(
    student: str,
    profile: str | None,
    machine: str | None,
    batch_size: int | None,
    steps: int,
    rounds: int | None,
    ablate: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Measure and show; the raw figures go to `out`, a plot of where time went to `plot`.

    `profile` and `machine`, left out, are `sdxl` on `gpu-80gb` where there is a CUDA GPU and `demo` on `cpu` where there is
    none; `batch_size`, left out, is the recipe's. In each of `rounds` the variants take turns, and the run of median speed
    counts. Where memory runs out, a variant's
    micro-batch is halved until it fits. Raises KoalaError for an unknown student, profile or machine, and where the machine
    lacks what the profile needs.
    """
    import torch

    cuda = torch.cuda.is_available()
    default = ("sdxl", "gpu-80gb") if cuda else ("demo", "cpu")
    params = load(profile=profile or default[0], machine=machine or default[1])
    config = params.distill(student)
    if batch_size:
        config = config.model_copy(update={"batch_size": batch_size})
    check(params.profile, params.requires, "bench")
    variants: dict[str, dict[str, Any]] = {runner.PLAIN: {}, OURS: {}}
    if ablate:
        for classes in ((), ("BasicTransformerBlock",)):
            if classes != config.machine.compile:
                variants[f"{OURS}, compile {' '.join(classes) or 'nothing'}"] = {"compile": classes}
        for switch in _SWITCHES:
            value = not getattr(config.machine, switch)
            variants[f"{OURS}, {switch} {str(value).lower()}"] = {switch: value}
        if config.teacher_dtype == "bfloat16" and _multiplies_float8():
            value = not config.teacher_float8
            variants[f"{OURS}, teacher_float8 {str(value).lower()}"] = {"teacher_float8": value}
    runs: dict[str, list[runner.Figures]] = {name: [] for name in variants}
    times = rounds or (1 if cuda else 3)
    turns = [name for _ in range(times) for name in variants]
    sizes = dict.fromkeys(variants, micro_batch(config, 1))
    for name in progress(turns, f"bench train {student}"):
        while True:
            spec = {
                "name": name,
                "student": student,
                "profile": params.profile,
                "machine": params.machine,
                "steps": steps,
            }
            changes = {**variants[name], "batch_size": config.batch_size, "micro_batch": sizes[name]}
            figures = runner.run("train_worker", {**spec, "changes": changes})
            if figures != runner.OUT_OF_MEMORY or sizes[name] == 1:
                break
            smaller = range(1, sizes[name])
            sizes[name] = max(size for size in smaller if config.batch_size % size == 0)
            say(f"bench train: {name} is out of memory; trying with micro_batch {sizes[name]}")
        runs[name].append(figures)
    rows = [{"name": name, **runner.median(found, "images_per_second")} for name, found in runs.items()]
    for row in rows:
        row["images_per_second_of_rounds"] = [figures.get("images_per_second") for figures in runs[row["name"]]]
    settings = {
        "student": student,
        "profile": params.profile,
        "machine": params.machine,
        "batch_size": config.batch_size,
        "steps": steps,
        "rounds": times,
    }
    # Whatever else the machine does slows a product as well: the device's peak is the best that was seen.
    peak = max((run.get("matmul_flops_per_second", 0) for found in runs.values() for run in found), default=0)
    settings["matmul_flops_per_second"] = peak
    report.train(report.document("train", settings, rows), out, plot)


def _multiplies_float8() -> bool:
    from koala.distill import float8
    from koala.generate import device

    return float8.possible(device())
