"""What each step sees: a function of the seed and the step, whoever asks and from wherever."""

import numpy as np
import pytest
import torch

from koala.config import load
from koala.data.latents import LatentSet
from koala.distill.batches import MicroBatches, Order, TrainingSet
from koala.distill.batches import load as load_batches
from koala.errors import KoalaError

CPU = torch.device("cpu")
BUCKETS = {(32, 32): np.arange(29), (32, 64): np.arange(29, 37)}


def test_a_batch_is_of_one_bucket_and_an_epoch_shows_no_sample_twice() -> None:
    order = Order(BUCKETS, batch_size=4, seed=0)
    assert order.batches_per_epoch == 29 // 4 + 8 // 4
    epoch = [order.at(step) for step in range(order.batches_per_epoch)]
    assert all((batch < 29).all() or (batch >= 29).all() for batch in epoch)
    seen = np.concatenate(epoch)
    assert len(np.unique(seen)) == len(seen)
    again = np.concatenate([order.at(step + order.batches_per_epoch) for step in range(order.batches_per_epoch)])
    assert not np.array_equal(seen, again)


def test_order_can_be_entered_anywhere() -> None:
    whole, late = Order(BUCKETS, 4, 0), Order(BUCKETS, 4, 0)
    steps = [whole.at(step).tolist() for step in range(25)]
    assert [late.at(step).tolist() for step in range(13, 25)] == steps[13:]


def test_processes_share_the_global_batch() -> None:
    order = Order(BUCKETS, 8, 0)
    alone = [place for places in MicroBatches(order, 2, 0, 1, 3, 5) for place in places]
    shared = [place for rank in (0, 1) for places in MicroBatches(order, 2, rank, 2, 3, 5) for place in places]
    assert sorted(shared) == sorted(alone)
    assert len(set(shared)) == 16


def test_noise_follows_from_seed_step_and_place_alone(distillable) -> None:
    params = load()
    data = LatentSet(params.out("encode"))
    assert len(data) == 37
    items = TrainingSet(data, params.distill, 1000)
    number, latent, noise, timestep, _, caption, time_ids = items[(5, 2, 30)]
    assert number == 30
    assert latent.shape == (4, 8, 16) and time_ids == (64, 129, 0, 1, 32, 64) and "background" in caption
    torch.manual_seed(123)
    again = items[(5, 2, 30)]
    assert torch.equal(again[2], noise) and again[3] == timestep
    assert not torch.equal(items[(6, 2, 30)][2], noise)
    assert not torch.equal(items[(5, 3, 30)][2], noise)


def test_few_step_teachers_are_trained_at_their_own_timesteps(distillable, change_params) -> None:
    change_params(distill={"timesteps": [249, 999]})
    params = load()
    items = TrainingSet(LatentSet(params.out("encode")), params.distill, 1000)
    assert {items[(step, 0, 0)][3] for step in range(20)} == {249, 999}


def test_a_batch_that_does_not_divide_is_refused(distillable) -> None:
    params = load()
    with pytest.raises(KoalaError, match=r"batch_size 8 does not divide .* multiple of 12"):
        next(load_batches(LatentSet(params.out("encode")), params.distill, lambda _: None, 1000, 0, 3, 0, CPU))
    with pytest.raises(KoalaError, match=r"fewer than distill\.batch_size 64"):
        Order(BUCKETS, 64, 0)
