"""Which features are compared, and that they are captured when they should be, and only then."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from koala.distill.config import FeatureConfig
from koala.distill.features import Tap, feature_pairs, match_layers
from koala.distill.hooks import Capture
from koala.errors import KoalaError
from koala.params import load
from koala.unet.blocks import keep
from koala.unet.reference import SDXL

ROOT = Path(__file__).parents[2]


def rule(student: str):
    return load(ROOT / "params.yaml").student(student).unet


def stages(student: str):
    return keep(SDXL, rule(student))


def test_koala_compares_every_self_attention_layer_and_the_last_feature_of_the_outer_stages() -> None:
    pairs = feature_pairs("koala", stages("koala-700m"))
    attention = [pair for pair in pairs if pair.kind == "self_attention"]
    assert len(attention) == 21
    assert {pair.stage for pair in pairs if pair.kind == "last"} == {"DW1", "UP3"}
    assert len(feature_pairs("koala", stages("koala-1b"))) == 30 + 2


def test_second_pair_of_an_up_stage_is_compared_with_the_teachers_third() -> None:
    config = FeatureConfig(kind="self_attention", stages=("UP1",))
    pairs = feature_pairs([config], stages("koala-700m"))
    found = [(pair.student.path, pair.teacher.path) for pair in pairs if "attentions.1" in pair.student.path]
    assert found[0] == (
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn1",
    )
    assert len(found) == 5


def test_bk_sdm_compares_the_last_feature_of_every_stage_that_the_student_has() -> None:
    assert [pair.stage for pair in feature_pairs("bk-sdm", stages("koala-700m"))] == [
        "DW1",
        "DW2",
        "DW3",
        "UP1",
        "UP2",
        "UP3",
    ]
    assert "Mid" in [pair.stage for pair in feature_pairs("bk-sdm", stages("koala-1b"))]


def test_a_stage_without_the_feature_is_refused_with_those_that_have_it() -> None:
    with pytest.raises(KoalaError, match=r"self_attention in stage DW1: choose from DW2, DW3, UP1, UP2$"):
        feature_pairs([FeatureConfig(kind="self_attention", stages=("DW1",))], stages("koala-700m"))


@pytest.mark.parametrize(
    ("how", "layers"), [("first", [0, 1, 2, 3]), ("last", [6, 7, 8, 9]), ("interleaved", [0, 3, 6, 9])]
)
def test_depth_matching(how: str, layers: list[int]) -> None:
    assert match_layers(4, 10, how) == layers


@pytest.mark.parametrize("kind", ["self_attention", "cross_attention", "feed_forward"])
def test_after_residual_differs_from_before_it_by_what_came_in(kind: str, tiny_teacher) -> None:
    """Captured after the residual add, a feature is the layer's input plus the one captured before it."""
    unet = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True).unet
    own = keep(unet.config, rule("koala-1b"))
    before, after = (
        feature_pairs([FeatureConfig(kind=kind, stages=("DW2",), after_residual=flag)], own)[0].teacher
        for flag in (False, True)
    )
    block = before.path.rpartition(".")[0]
    entry = Tap(
        {"self_attention": block, "cross_attention": f"{block}.norm2", "feed_forward": f"{block}.norm3"}[kind], "input"
    )
    found = record(Capture(unet, [before, after, entry]), unet)
    torch.testing.assert_close(found[after], found[entry] + found[before])


def test_layers_can_be_chosen() -> None:
    config = FeatureConfig(kind="self_attention", stages=("UP1",), layers=(0, 4), match="last")
    found = [
        pair.teacher.path.rpartition("transformer_blocks.")[2] for pair in feature_pairs([config], stages("koala-700m"))
    ]
    assert found == ["5.attn1", "9.attn1"] * 2
    with pytest.raises(KoalaError, match=r"no layer 5 in stage UP1: choose from 0, 1, 2, 3, 4$"):
        feature_pairs([FeatureConfig(kind="self_attention", stages=("UP1",), layers=(5,))], stages("koala-700m"))


def test_a_feature_named_twice_is_refused() -> None:
    with pytest.raises(KoalaError, match=r"last of stage DW1 is named twice"):
        feature_pairs([FeatureConfig(kind="last"), FeatureConfig(kind="last", stages=("DW1",))], stages("koala-700m"))


def test_an_impossible_pair_is_refused_when_the_configuration_is_read(workspace, change_params) -> None:
    change_params(distill={"features": [{"kind": "self_attention", "stages": ["Mid"]}]})
    with pytest.raises(
        KoalaError,
        match=r"smoke\.distill\.features: koala-700m: .* self_attention in stage Mid: choose from DW2, DW3, UP1, UP2$",
    ):
        load()


def test_nothing_is_recorded_outside_recording(tiny_teacher) -> None:
    unet = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True).unet
    capture = Capture(unet, [Tap("down_blocks.0")])
    found = record(capture, unet)
    first = found[Tap("down_blocks.0")].clone()
    forward(unet, seed=1)
    assert torch.equal(found[Tap("down_blocks.0")], first)


def test_a_feature_that_was_not_met_stops_training(tiny_teacher) -> None:
    unet = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True).unet
    capture = Capture(unet, [Tap("down_blocks.0"), Tap("mid_block")])
    with pytest.raises(RuntimeError, match="2 of 2 features were not captured"), capture.recording():
        pass


def record(capture: Capture, unet) -> dict:
    with capture.recording() as found:
        forward(unet, seed=0)
    return found


def forward(unet, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    with torch.no_grad():
        unet(
            torch.randn(2, 4, 8, 8, generator=random),
            10,
            encoder_hidden_states=torch.randn(2, 5, width, generator=random),
            added_cond_kwargs={
                "text_embeds": torch.randn(2, width // 2, generator=random),
                "time_ids": torch.zeros(2, 6),
            },
        )
