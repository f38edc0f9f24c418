"""Latency of U-Nets."""

from types import SimpleNamespace

from koala.evaluate import latency
from koala.evaluate.latency import step_latency


def test_latency_of_a_smaller_unet_is_lower(tiny_teacher, students) -> None:
    from diffusers import UNet2DConditionModel

    unet, student = (
        UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        for folder in (tiny_teacher, students[0])
    )
    assert 0 < step_latency(student, tokens=8, batch=1, repeats=9) < step_latency(unet, tokens=8, batch=1, repeats=9)


def test_latency_is_the_median_after_a_warm_up(tiny_teacher, monkeypatch) -> None:
    """The first pass, which prepares kernels, takes 100 s by this clock; the others 3, 1 and 2."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_teacher / "unet", use_safetensors=True)
    now, takes = [0.0], iter([100.0, 3.0, 1.0, 2.0])
    unet.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + next(takes)))
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert step_latency(unet, tokens=8, batch=1, repeats=3) == 2
