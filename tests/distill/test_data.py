"""The data of each step: a function of the seed and the step, whoever asks and from wherever."""

import numpy as np
import pytest
import torch

from koala.data.latents import LatentSet
from koala.distill.data import MicroBatches, Order, TrainingSet, too_small
from koala.distill.launch_settings import micro_batch
from koala.errors import KoalaError

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


def test_noise_follows_from_seed_step_and_place_only(artifacts, recipe) -> None:
    data = LatentSet(artifacts.latents)
    assert len(data) == 37
    items = TrainingSet(data, recipe(), 1000)
    number, latent, noise, timestep, _, caption, time_ids = items[(5, 2, 30)]
    assert number == 30
    assert latent.shape == (4, 8, 16)
    assert time_ids == (64, 129, 0, 1, 32, 64)
    assert "background" in caption
    torch.manual_seed(123)
    again = items[(5, 2, 30)]
    assert torch.equal(again[2], noise)
    assert again[3] == timestep
    assert not torch.equal(items[(6, 2, 30)][2], noise)
    assert not torch.equal(items[(5, 3, 30)][2], noise)


def test_few_step_teachers_are_trained_at_their_own_timesteps(artifacts, recipe) -> None:
    items = TrainingSet(LatentSet(artifacts.latents), recipe(timesteps=(249, 999)), 1000)
    assert {items[(step, 0, 0)][3] for step in range(20)} == {249, 999}


def test_timesteps_that_the_teacher_does_not_have_are_refused(artifacts, recipe) -> None:
    with pytest.raises(KoalaError, match=r"distill\.timesteps has 1000, where the teacher has 0 to 999"):
        TrainingSet(LatentSet(artifacts.latents), recipe(timesteps=(499, 1000)), 1000)


def test_a_batch_that_no_bucket_fills_is_refused() -> None:
    with pytest.raises(KoalaError, match=r"fewer than distill\.batch_size 64"):
        Order(BUCKETS, 64, 0)


def test_buckets_that_never_fill_a_batch_are_named() -> None:
    assert too_small(BUCKETS, 9) == {(32, 64): 8}
    assert too_small(BUCKETS, 8) == {}


@pytest.mark.parametrize(
    ("batch", "most", "processes", "size"), [(8, 4, 1, 4), (8, 32, 2, 4), (18, 4, 1, 3), (7, 3, 1, 1)]
)
def test_the_micro_batch_is_the_largest_divisor_that_the_machine_allows(
    recipe, batch: int, most: int, processes: int, size: int
) -> None:
    assert micro_batch(recipe(batch_size=batch, machine={"micro_batch": most}), processes) == size
