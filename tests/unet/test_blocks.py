"""What a rule keeps of a teacher, and what it is refused for."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from koala.errors import KoalaError
from koala.unet.blocks import Stage, StudentRule, keep, teacher_stages
from koala.unet.reference import SDXL

KOALA = {"down_pairs": (0,), "up_pairs": (0, 2), "mid": "keep"}


def rule(**changes: Any) -> StudentRule:
    return StudentRule(**KOALA | changes)


def test_koala_700m_keeps_of_sdxl_what_the_paper_keeps(rules):
    assert keep(SDXL, rules["koala-700m"]) == (
        Stage("DW1", "down_blocks.0", (0,), (0,), (0,)),
        Stage("DW2", "down_blocks.1", (0,), (2,), (2,)),
        Stage("DW3", "down_blocks.2", (0,), (5,), (10,)),
        Stage("UP1", "up_blocks.0", (0, 2), (5, 5), (10, 10)),
        Stage("UP2", "up_blocks.1", (0, 2), (2, 2), (2, 2)),
        Stage("UP3", "up_blocks.2", (0, 2), (0, 0), (0, 0)),
    )


def test_koala_1b_keeps_the_mid_block(rules):
    depths = {stage.name: stage.depths for stage in keep(SDXL, rules["koala-1b"])}
    assert depths == {
        "DW1": (0,),
        "DW2": (2,),
        "DW3": (6,),
        "Mid": (6,),
        "UP1": (6, 6),
        "UP2": (2, 2),
        "UP3": (0, 0),
    }


def test_a_teachers_own_stages_are_all_it_has():
    depths = {stage.name: stage.depths for stage in teacher_stages(SDXL)}
    assert depths == {
        "DW1": (0, 0),
        "DW2": (2, 2),
        "DW3": (10, 10),
        "Mid": (10,),
        "UP1": (10, 10, 10),
        "UP2": (2, 2, 2),
        "UP3": (0, 0, 0),
    }
    assert all(stage.depths == stage.teacher_depths for stage in teacher_stages(SDXL))


@pytest.mark.parametrize(
    ("share", "of_ten", "of_three"), [("5/10", 5, 2), ("6/10", 6, 2), ("1/3", 4, 1), ("1/1", 10, 3)]
)
def test_a_share_of_the_teachers_depth_is_rounded_up(share, of_ten, of_three):
    for layers, kept in ((10, of_ten), (3, of_three)):
        stages = keep(dict(SDXL) | {"transformer_layers_per_block": (1, 2, layers)}, rule(depth={"UP1": share}))
        assert next(stage.depths for stage in stages if stage.name == "UP1") == (kept, kept)


def test_a_depth_for_each_pair():
    stages = {stage.name: stage for stage in keep(SDXL, rule(depth={"UP1": [4, "7/10"], "UP2": 1}))}
    assert stages["UP1"].depths == (4, 7)
    assert stages["UP2"].depths == (1, 1)


def test_configurations_in_all_of_diffusers_spellings():
    """Two levels; a list of layers; nested depths, the way up by itself; a mid block of residual blocks."""
    config = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": [2, 1],
        "transformer_layers_per_block": [[3, 4], 1],
        "reverse_transformer_layers_per_block": [1, [5, 6, 7]],
    }
    assert [(stage.name, stage.depths) for stage in teacher_stages(config)] == [
        ("DW1", (3, 4)),
        ("DW2", (0,)),
        ("Mid", (0,)),
        ("UP1", (0, 0)),
        ("UP2", (5, 6, 7)),
    ]
    without_mid = config | {"mid_block_type": None, "layers_per_block": 2}
    assert [stage.name for stage in teacher_stages(without_mid)] == ["DW1", "DW2", "UP1", "UP2"]


def test_four_levels_with_one_depth_for_all():
    """Stable Diffusion 1's shape."""
    config = {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
    }
    kept = keep(config, rule())
    assert [stage.name for stage in kept] == ["DW1", "DW2", "DW3", "DW4", "Mid", "UP1", "UP2", "UP3", "UP4"]
    assert [stage.depths for stage in kept] == [(1,)] * 3 + [(0,), (1,), (0, 0)] + [(1, 1)] * 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"down_pairs": ()}, "one pair at least"),
        ({"down_pairs": (-1,)}, "counted from 0"),
        ({"up_pairs": (0, 0)}, "pair 0 is named twice"),
        ({"up_pairs": (2, 0)}, "pair 0 is out of order"),
        ({"up_pairs": (0,)}, "one more than down_pairs"),
        ({"mid": "half"}, "'keep', 'resnets' or 'drop'"),
        ({"depth": {"DW4x": 1}}, "no stage is called 'DW4x'"),
        ({"depth": {"DW3": "11/10"}}, "depth of DW3: '11/10' is no share"),
        ({"depth": {"DW3": "0/10"}}, "is no share"),
        ({"depth": {"DW3": "1/0"}}, "is no share"),
        ({"depth": {"DW3": "half"}}, "is no share"),
        ({"depth": {"DW3": 0}}, "neither a count of layers"),
        ({"depth": {"DW3": True}}, "neither a count of layers"),
        ({"depth": {"DW3": 0.5}}, "neither a count of layers"),
        ({"depth": {"UP1": [5]}}, "must be one figure, or 2"),
        ({"depth": [5]}, "must map stages to depths"),
        ({"depth": {"Mid": 5}, "mid": "drop"}, "take Mid out of depth"),
        ({"depths": {}}, "Extra inputs"),
    ],
)
def test_bad_rules_are_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint) as refusal:
        rule(**changes)
    assert "\n" not in refusal.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"up_pairs": (0, 3)}, "pair 3 of UP1, where the teacher has pairs 0, 1, 2"),
        ({"down_pairs": (2,)}, "pair 2 of DW1, where the teacher has pairs 0, 1"),
        ({"depth": {"UP1": 11}}, "depth of UP1: 11 layers, where the teacher's pair 0 has 10"),
        ({"depth": {"UP4": 1}}, "depth names UP4, .* choose from DW2, DW3, Mid, UP1, UP2"),
        ({"depth": {"DW1": 1}}, "depth names DW1, .* choose from DW2"),
    ],
)
def test_what_sdxl_lacks_is_refused(changes, complaint):
    with pytest.raises(KoalaError, match=complaint) as refusal:
        keep(SDXL, rule(**changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mid_block_type": None}, "no mid block to keep"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "block of type UNetMidBlock2DSimpleCrossAttn"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, "block of type AttnDownBlock2D"),
        ({"transformer_layers_per_block": (1, 2, (10,))}, "1 transformer depths to DW3's 2 pairs"),
    ],
)
def test_teachers_of_another_shape_are_refused(changes, complaint):
    with pytest.raises(KoalaError, match=complaint):
        keep(dict(SDXL) | changes, rule())


def test_rules_load_without_torch():
    """The configuration imports this module; `koala --help` must not wait for torch."""
    code = "import sys, koala.unet.reference; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
