"""`koala bench train`: a step of distillation as koala takes it, beside the plain recipe's, on random weights.

Both distil the same student from the same teacher with the same batch. Ours is what `koala distill` runs: its loader over
encoded samples on disk, its task and its Learner. A step is timed after warm-up; what it computes is counted as one
forward pass of the teacher and three of the student (backward is two), whatever is computed twice or beside that.
"""

from pathlib import Path
from typing import Any

from koala.bench import report, runner
from koala.config import load
from koala.console import progress, say
from koala.requirements import check

OURS = "koala"
_SWITCHES = ("compile", "channels_last", "gradient_checkpointing", "deterministic")  # what --ablate turns, one by one


def bench(
    student: str, profile: str | None, steps: int, rounds: int | None, ablate: bool, out: Path | None, plot: Path | None
) -> None:
    """Measure and print; the raw figures go to `out`, a plot of where time went to `plot`.

    profile: left out, `sdxl` where there is a CUDA GPU and `demo` where there is none. rounds: the variants take turns so
    often, and the run of median speed counts. Where memory runs out, a variant's micro-batch is halved until it fits.
    Raises KoalaError for an unknown student or profile, and where the machine lacks what the profile needs.
    """
    import torch

    cuda = torch.cuda.is_available()
    params = load(profile=profile or ("sdxl" if cuda else "demo"))
    params.student(student)
    check(params.profile, params.requires, "bench")
    variants: dict[str, dict[str, Any]] = {runner.PLAIN: {}, OURS: {}}
    if ablate:
        from koala import pipeline
        from koala.distill import float8

        able = params.distill.teacher_dtype == "bfloat16" and float8.possible(pipeline.device())
        for switch in (*_SWITCHES, *(["teacher_float8"] if able else [])):
            value = not getattr(params.distill, switch)
            variants[f"{OURS}, {switch} {str(value).lower()}"] = {switch: value}
    runs: dict[str, list[runner.Figures]] = {name: [] for name in variants}
    times = rounds or (1 if cuda else 3)
    turns = [name for _ in range(times) for name in variants]
    micro_batch = dict.fromkeys(variants, params.distill.micro_batch)
    for name in progress(turns, f"bench train {student}"):
        while True:
            spec = {"name": name, "student": student, "profile": params.profile, "steps": steps}
            changes = {**variants[name], "micro_batch": micro_batch[name]}
            figures = runner.run("train_worker", {**spec, "changes": changes})
            if figures != runner.OUT_OF_MEMORY or micro_batch[name] == 1:
                break
            smaller = range(1, micro_batch[name])
            micro_batch[name] = max(size for size in smaller if params.distill.batch_size % size == 0)
            say(f"bench train: {name} is out of memory; trying with micro_batch {micro_batch[name]}")
        runs[name].append(figures)
    rows = [{"name": name, **runner.median(found, "images_per_second")} for name, found in runs.items()]
    for row in rows:
        row["images_per_second_of_rounds"] = [figures.get("images_per_second") for figures in runs[row["name"]]]
    settings = {"student": student, "profile": params.profile, "steps": steps, "rounds": times}
    # What else the machine does slows a product as well: the device's peak is the best that was seen.
    peak = max((run.get("matmul_flops_per_second", 0) for found in runs.values() for run in found), default=0)
    settings["matmul_flops_per_second"] = peak
    report.train(report.document("train", settings, rows), out, plot)
