"""The terms of the objective against values worked out by hand."""

import pytest
import torch

from koala.distill.losses import min_snr_weight, mse, snr, total


def test_mse_is_taken_in_fp32() -> None:
    a = torch.full((2, 8), 300.0, dtype=torch.float16)
    assert mse(a, torch.zeros_like(a)).item() == 90_000  # 300^2 overflows fp16
    assert mse(a, a).dtype == torch.float32


def test_mse_weighs_each_sample() -> None:
    a, b = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.zeros(2, 2)
    assert mse(a, b, torch.tensor([1.0, 0.5])).item() == pytest.approx((1 * 1 + 4 * 0.5) / 2)


def test_min_snr() -> None:
    ratio = torch.tensor([0.5, 5.0, 50.0])
    torch.testing.assert_close(min_snr_weight(ratio, 5, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(min_snr_weight(ratio, 5, "v_prediction"), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 51]))
    torch.testing.assert_close(snr(torch.tensor([0.9, 0.5]), torch.tensor([1, 0])), torch.tensor([1.0, 9.0]))


def test_total_weighs_all_stages_of_the_feature_term_alike() -> None:
    terms = {
        "task": torch.tensor(1.0),
        "output": torch.tensor(2.0),
        "feature/DW2": torch.tensor(3.0),
        "feature/UP1": torch.tensor(4.0),
    }
    assert total(terms, {"task": 1, "output": 0, "feature": 0.5}).item() == pytest.approx(1 + 3.5)
