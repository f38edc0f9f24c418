"""`koala bench infer`: SDXL's U-Net beside its students', each in a whole pipeline on random weights.

A step is one forward pass with guidance (two samples). A generation is the text encoders, N steps of Euler and the VAE's
decoder, all on the device, as diffusers runs it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koala.bench import report, runner
from koala.console import progress
from koala.errors import KoalaError
from koala.generate import check_dtype
from koala.params import load
from koala.unet.blocks import keep
from koala.unet.reference import RULES, SDXL, VAE_FACTOR

MODELS = ("sdxl", "ssd-1b", "vega", "koala-1b", "koala-700m")
CARDS_GIB = (8, 11, 24)
_SMALLEST = 32  # px: what the VAE and the U-Net's levels divide


def bench(
    models: Sequence[str],
    size: int | None,
    steps: int,
    dtype: str | None,
    compiled: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Measure and show; the raw figures go to `out`, a plot to `plot`.

    `models` are students of params.yaml or of koala.unet.reference.RULES; none: all five. `size` is in px; left out, 1024 on a
    GPU and 256 on a CPU. `dtype`, left out, is float16 on a GPU and float32 on a CPU. On a GPU each model also runs held to
    the memory of common cards. Raises KoalaError for a model or a dtype that is none of these, and for a size that cannot be had.
    """
    rules = {**RULES, **{name: student.unet for name, student in load().students.items()}}
    names = models or MODELS
    for name in names:
        if name not in rules:
            raise KoalaError(f"no U-Net {name!r} to measure: choose from {', '.join(rules)}")
    if size is not None and (size < _SMALLEST or size % _SMALLEST):
        raise KoalaError(f"--size {size}: must be a multiple of {_SMALLEST} pixels")
    check_dtype(dtype)

    import torch

    from koala.unet.student import empty_unet, student_config

    cuda = torch.cuda.is_available()
    size = size or (1024 if cuda else 256)
    unets = {
        name: {**student_config(SDXL, keep(SDXL, rules[name])), "sample_size": size // VAE_FACTOR} for name in names
    }
    limits = [
        limit for limit in CARDS_GIB if cuda and limit < torch.cuda.get_device_properties(0).total_memory / report.GIB
    ]
    settings: dict[str, Any] = {
        "size": size,
        "steps": steps,
        "dtype": dtype or ("float16" if cuda else "float32"),
        "compile": compiled,
    }
    rows = []
    fits: dict[str, dict[str, str]] = {name: {} for name in unets}
    turns = [(name, limit) for name in unets for limit in (None, *limits)]
    for name, limit in progress(turns, "bench infer"):
        figures = runner.run("infer_worker", {"unet": unets[name], "limit_gib": limit, **settings})
        if limit is None:
            parameters = empty_unet(unets[name]).num_parameters()
            rows.append({"name": name, "parameters": parameters, "fits": fits[name], **figures})
        else:
            fits[name][str(limit)] = (
                "failed" if "failed" in figures else "no" if figures == runner.OUT_OF_MEMORY else "yes"
            )
    report.infer(report.document("infer", {**settings, "limits_gib": limits}, rows), out, plot)
