"""Each tensor of the student is the teacher's that the map names, to the bit."""

import re

import pytest
import torch

from koala.errors import KoalaError
from koala.unet.blocks import StudentRule, keep
from koala.unet.reference import SDXL
from koala.unet.student import build_student, empty_unet, student_config
from koala.unet.weights import check, copy_weights, weight_map


@pytest.fixture(scope="module")
def sdxl_shapes():
    return empty_unet(SDXL).state_dict()


def map_of(rule):
    stages = keep(SDXL, rule)
    shapes = empty_unet(student_config(SDXL, stages)).state_dict()
    return weight_map(stages, shapes), shapes


@pytest.mark.parametrize(
    ("name", "tensors"), [("sdxl", 1680), ("koala-1b", 790), ("koala-700m", 584), ("ssd-1b", None), ("vega", None)]
)
def test_every_tensor_of_a_student_of_sdxl_has_its_own_in_the_teacher(rules, sdxl_shapes, name, tensors):
    weights, shapes = map_of(rules[name])
    assert weights.keys() == shapes.keys()
    assert set(weights.values()) <= sdxl_shapes.keys()
    assert len(set(weights.values())) == len(weights)
    assert tensors is None or len(weights) == tensors
    check(weights, shapes, sdxl_shapes)


def test_koala_takes_the_up_stages_second_pair_from_the_teachers_third(rules):
    weights, _ = map_of(rules["koala-1b"])
    second = re.compile(r"(up_blocks\.\d\.(?:resnets|attentions)\.)1(\..*)")
    expected = {name: second.sub(r"\g<1>2\g<2>", name) for name in weights}
    assert weights == expected
    assert weights["up_blocks.2.resnets.1.conv1.weight"] == "up_blocks.2.resnets.2.conv1.weight"
    for same in (
        "up_blocks.1.resnets.0.conv1.weight",
        "up_blocks.0.upsamplers.0.conv.weight",
        "up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q.weight",
        "mid_block.resnets.1.conv1.weight",
        "down_blocks.0.downsamplers.0.conv.weight",
    ):
        assert weights[same] == same


def test_a_copy_by_name_would_go_wrong(rules, sdxl_shapes):
    """Why the map exists: 8 tensors would not fit, and UP3 would take another block without a word."""
    _, shapes = map_of(rules["koala-1b"])
    misfits = [name for name in shapes if shapes[name].shape != sdxl_shapes[name].shape]
    assert len(misfits) == 8
    assert {name[: len("up_blocks.0.resnets.1")] for name in misfits} == {
        "up_blocks.0.resnets.1",
        "up_blocks.1.resnets.1",
    }


def test_the_student_holds_the_teachers_tensors_to_the_bit(rules, teacher):
    student = build_student(teacher, rules["koala-1b"])
    ours, theirs = student.state_dict(), teacher.state_dict()
    for stage in ("up_blocks.0", "up_blocks.1", "up_blocks.2"):
        for kind in ("resnets", "attentions"):
            pair = {name: tensor for name, tensor in ours.items() if name.startswith(f"{stage}.{kind}.1.")}
            assert pair or (stage, kind) == ("up_blocks.2", "attentions")
            for name, tensor in pair.items():
                third = name.replace(f"{stage}.{kind}.1.", f"{stage}.{kind}.2.")
                assert torch.equal(tensor, theirs[third]), name
    for name in set(ours) - {name for name in ours if name.startswith("up_blocks.") and name.split(".")[3] == "1"}:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_students_tensors_are_copies(rules, teacher):
    student = build_student(teacher, rules["koala-1b"])
    before = teacher.conv_in.weight.clone()
    with torch.no_grad():
        student.conv_in.weight.add_(1)
    assert torch.equal(teacher.conv_in.weight, before)
    assert all(tensor.requires_grad for tensor in student.parameters())


def test_mid_resnets_keeps_the_first_residual_block(rules, teacher):
    student = build_student(teacher, StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="resnets"))
    mid = {name for name in student.state_dict() if name.startswith("mid_block.")}
    assert mid
    assert all(name.startswith("mid_block.resnets.0.") for name in mid)
    weight = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(student.state_dict()[weight], teacher.state_dict()[weight])


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        (
            {"up_pairs": (0, 1)},
            r"up_blocks\.0\.resnets\.1\.norm1\.weight \(1920\) .* \(2560\): the stage's pair 2 fits",
        ),
        ({"up_pairs": (1, 2)}, r"up_blocks\.1\.resnets\.0\.norm1\.weight .*: the stage's pair 0 fits"),
        ({"down_pairs": (1,)}, r"down_blocks\.1\.resnets\.0\.norm1\.weight .*: the stage's pair 0 fits"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(sdxl_shapes, pairs, complaint):
    weights, shapes = map_of(StudentRule(**{"down_pairs": (0,), "up_pairs": (0, 2), "mid": "keep"} | pairs))
    with pytest.raises(KoalaError, match=complaint) as refusal:
        check(weights, shapes, sdxl_shapes)
    assert "\n" not in str(refusal.value)


def test_a_map_with_a_hole_or_a_stranger_is_refused_and_nothing_is_copied(rules, teacher):
    student = build_student(teacher, rules["koala-1b"])
    with torch.no_grad():
        student.conv_in.weight.zero_()
    whole = weight_map(keep(teacher.config, rules["koala-1b"]), student.state_dict())
    hole = {name: source for name, source in whole.items() if name != "conv_out.bias"}
    for broken in (hole, whole | {"conv_out.bias": "conv_out.nothing"}, whole | {"nothing": "conv_out.bias"}):
        with pytest.raises(ValueError, match=r"conv_out\.bias|nothing"):
            copy_weights(student, teacher, broken)
    assert not student.conv_in.weight.any()
