"""Show what KOALA's rules would make of a fine-tune: parameters, FLOPs, and the blocks that are kept.

    python examples/inspect_finetune.py my-sdxl

`my-sdxl` is a pipeline folder, of which only configurations are read.
"""

import argparse
from pathlib import Path

from koala.console import show
from koala.teacher.shape import shape_of
from koala.unet.blocks import StudentRule, keep
from koala.unet.cost import student_cost, unet_cost

RULES = {
    "KOALA-1B": StudentRule(
        down_pairs=(0,), up_pairs=(0, 2), mid="keep", depth={"DW3": "6/10", "Mid": "6/10", "UP1": "6/10"}
    ),
    "KOALA-700M": StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="drop", depth={"DW3": "5/10", "UP1": "5/10"}),
}


def main() -> None:
    """Read the command line and show the costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--size", type=int, default=1024, help="side of the image, px")
    arguments = parser.parse_args()

    shape = shape_of(arguments.teacher)
    latent_size = arguments.size // shape.latent_factor
    teacher = unet_cost(shape.unet, latent_size)
    show(f"teacher: {teacher.parameters:,} parameters, {teacher.flops / 1e12:.3f} TFLOP")
    for name, rule in RULES.items():
        cost = student_cost(shape.unet, rule, latent_size)
        share = cost.parameters / teacher.parameters
        show(f"{name}: {cost.parameters:,} parameters ({share:.1%}), {cost.flops / 1e12:.3f} TFLOP")
        for stage in keep(shape.unet, rule):
            show(
                f"  {stage.name}: pairs {list(stage.pairs)}, {list(stage.depths)} of {list(stage.teacher_depths)} layers"
            )


if __name__ == "__main__":
    main()
