"""Latency of U-Nets."""

from koala.evaluate.latency import step_latency


def test_latency_of_a_smaller_unet_is_lower(tiny_teacher, students) -> None:
    from diffusers import UNet2DConditionModel

    unet, student = (
        UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        for folder in (tiny_teacher, students[0])
    )
    seconds = step_latency({"teacher": unet, "student": student}, tokens=8, batch=1, repeats=9)
    assert 0 < seconds["student"] < seconds["teacher"]
