"""The data of each step: a function of the seed and the step, whoever asks and from wherever."""

import numpy as np
import pytest
import torch

from koala.data.latents import LatentSet
from koala.distill.data import Buckets, MicroBatches, Order, TrainingSet, too_small
from koala.distill.launch_settings import micro_batch
from koala.errors import KoalaError

BUCKETS = {(32, 32): np.arange(29), (32, 64): np.arange(29, 37)}


SIZES = {
    "one that divides": [32],
    "one": [29],
    "two": [29, 8],
    "smaller than a batch": [100, 3, 1, 7],
    "all smaller than a batch": [3, 2],
    "just more than a batch": [9, 11, 15],
    "many": [3, 64, 17, 5, 40, 8, 23, 1, 31],
}


def of_sizes(sizes: list[int]) -> Buckets:
    starts = np.cumsum([0, *sizes])
    return {(32, 32 + place): np.arange(starts[place], starts[place + 1]) for place in range(len(sizes))}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_sample_is_seen_once_an_epoch(sizes: list[int]) -> None:
    """After every epoch each bucket lacks fewer samples than a batch, and those open its next one."""
    buckets, batch = of_sizes(sizes), 8
    order = Order(buckets, batch, seed=3)
    seen = np.zeros(sum(sizes), dtype=int)
    for epoch in range(2 * batch):
        for step in range(order.steps(epoch), order.steps(epoch + 1)):
            found = order.at(step)
            assert len(found) == batch
            assert sum(np.isin(found, numbers).all() for numbers in buckets.values()) == 1
            np.add.at(seen, found, 1)
        for numbers in buckets.values():
            lacking = epoch + 1 - seen[numbers]
            assert lacking.min() >= 0
            assert lacking.sum() == (epoch + 1) * len(numbers) % batch
    assert (seen == 2 * batch).all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_batch_repeats_a_sample_only_in_a_bucket_of_fewer_than_two_batches(sizes: list[int]) -> None:
    order, batch = Order(of_sizes(sizes), 8, 3), 8
    small = [numbers for numbers in of_sizes(sizes).values() if len(numbers) < 2 * batch]
    for step in range(order.steps(30)):
        found = order.at(step)
        if not any(found[0] in numbers for numbers in small):
            assert len(np.unique(found)) == batch
        assert np.bincount(found).max() <= -(-batch // min(sizes)) + 1


def test_epochs_differ() -> None:
    order = Order(of_sizes([32]), 8, 0)
    first, second = (np.concatenate([order.at(step) for step in range(start, start + 4)]) for start in (0, 4))
    assert sorted(first) == sorted(second) == list(range(32))
    assert not np.array_equal(first, second)


def test_buckets_take_turns() -> None:
    """A bucket's batches are spread over an epoch, and its share of them is its share of the samples."""
    order = Order(of_sizes([600, 200]), 8, 0)
    small = [step for step in range(order.steps(1)) if order.at(step)[0] >= 600]
    assert len(small) == 25
    assert max(np.diff(small)) < 20


def test_order_can_be_entered_anywhere() -> None:
    for sizes in SIZES.values():
        whole = Order(of_sizes(sizes), 8, 0)
        steps = [whole.at(step).tolist() for step in range(60)]
        for start in (1, 13, 42):
            late = Order(of_sizes(sizes), 8, 0)
            assert [late.at(step).tolist() for step in range(start, 60)] == steps[start:]


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


def test_buckets_that_fill_no_batch_are_named() -> None:
    assert too_small(BUCKETS, 9) == {(32, 64): 8}
    assert too_small(BUCKETS, 8) == {}


@pytest.mark.parametrize(
    ("batch", "most", "processes", "size"), [(8, 4, 1, 4), (8, 32, 2, 4), (18, 4, 1, 3), (7, 3, 1, 1)]
)
def test_the_micro_batch_is_the_largest_divisor_that_the_machine_allows(
    recipe, batch: int, most: int, processes: int, size: int
) -> None:
    assert micro_batch(recipe(batch_size=batch, machine={"micro_batch": most}), processes) == size
