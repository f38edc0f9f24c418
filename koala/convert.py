"""The command `koala convert-lora`: a LoRA for SDXL, renamed for a student."""

from pathlib import Path

from koala.console import say, show
from koala.errors import KoalaError
from koala.inspect import rule_of
from koala.unet.blocks import keep
from koala.unet.reference import SDXL


def convert_lora(lora: Path, to: str, out: Path) -> None:
    """Write the LoRA for the student `to`, and show the modules that the student lacks, one a line.

    `to` is a student of params.yaml or a known one, or the folder of a student's pipeline. Raises KoalaError where it is
    neither, or the LoRA is not one for SDXL.
    """
    if not lora.is_file():
        raise KoalaError(f"there is no LoRA at {lora}: give a .safetensors file")
    if out.exists() and out.samefile(lora):
        raise KoalaError(f"--out {out} is the LoRA itself: name another file")
    rule = rule_of(to)
    from koala.publish.lora import convert, kept, renaming
    from koala.teacher.shape import read_json
    from koala.unet.student import student_config

    if rule:
        stages = keep(SDXL, rule)
        config = student_config(SDXL, stages)
    else:
        stages = kept(Path(to), SDXL)
        config = read_json(Path(to, "unet", "config.json"))
    found = convert(lora, out, renaming(SDXL, config, stages))
    for module in found.dropped:
        show(module)
    count = len(found.kept) + len(found.dropped)
    say(f"{len(found.kept)} of the U-Net's {count} modules are in {out}; {to} lacks the {len(found.dropped)} listed")
