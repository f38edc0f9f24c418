"""The source of each of the student's tensors: an explicit map from its name to the teacher's.

Names are the same in both, except that a pair of a down or up stage takes the teacher's pair that its stage names: in
KOALA, pair 1 of an up stage takes the teacher's pair 2. A copy by name alone would take pair 1, which differs in shape
in UP1 and UP2, and in UP3 is, unnoticed, another residual block (reference: youngwanLEE/sdxl-koala).
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from koala.errors import KoalaError
from koala.unet.blocks import Stage

_PAIR = re.compile(r"(?P<stage>(?:down|up)_blocks\.\d+)\.(?P<kind>resnets|attentions)\.(?P<pair>\d+)\.(?P<rest>.+)")


def weight_map(stages: Iterable[Stage], student_keys: Iterable[str]) -> dict[str, str]:
    """Return the teacher's tensor for each of the student's, by name: `{student name: teacher name}`.

    A residual block of an up stage joins what comes up to it with a skip. The first takes the deeper stage's output,
    the last the skip from the input of the stage's counterpart on the way down, those between only features of their
    own width. So the student's last pair has the input channels of the teacher's last: pair 2 fits where pair 1 was.
    """
    pairs = {stage.path: stage.pairs for stage in stages}
    return {key: _teacher_name(key, pairs) for key in student_keys}


def _teacher_name(key: str, pairs: Mapping[str, tuple[int, ...]]) -> str:
    match = _PAIR.fullmatch(key)
    if match is None:
        return key
    pair = pairs[match["stage"]][int(match["pair"])]
    return f"{match['stage']}.{match['kind']}.{pair}.{match['rest']}"


def check(weights: Mapping[str, str], student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> None:
    """Assert that the map gives each tensor of the student one of the teacher's of its shape. Meta tensors will do.

    Raises ValueError for a map of another student or teacher, KoalaError for a rule whose blocks do not fit together.
    """
    for name, source in weights.items():
        if name in student and source in teacher and student[name].shape != teacher[source].shape:
            raise KoalaError(
                f"the student's {name} ({_text(student[name])}) cannot take the teacher's {source} "
                f"({_text(teacher[source])}): {_what_fits(source, student[name], teacher)}"
            )
    missing = student.keys() - weights.keys()
    unexpected = (weights.keys() - student.keys()) | (set(weights.values()) - teacher.keys())
    if missing or unexpected:
        raise ValueError(f"the map lacks {sorted(missing)} and names {sorted(unexpected)}")


def _text(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _what_fits(source: str, wanted: torch.Tensor, teacher: Mapping[str, torch.Tensor]) -> str:
    """Return the teacher's pairs whose tensor of this name has the wanted shape, in words."""
    match = _PAIR.fullmatch(source)
    others = [other for name in teacher if (other := _PAIR.fullmatch(name)) and teacher[name].shape == wanted.shape]
    place = ("stage", "kind", "rest")
    pairs = [other["pair"] for other in others if match and other.group(*place) == match.group(*place)]
    return f"the stage's pair {' or '.join(pairs)} fits" if pairs else "no pair of the stage fits"


def copy_weights(student: nn.Module, teacher: nn.Module, weights: Mapping[str, str]) -> None:
    """Give the student copies of the teacher's tensors, in the teacher's dtype; the student may stand on meta tensors.

    0 missing, 0 unexpected, every shape the same, or an error as `check` raises it and a student left as it was.
    """
    source = teacher.state_dict()
    check(weights, student.state_dict(), source)
    student.load_state_dict(
        {name: source[origin].clone() for name, origin in weights.items()}, strict=True, assign=True
    )
