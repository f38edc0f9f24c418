"""The data of each training step, as a pure function of (seed, step): there is nothing to save, so resume is exact.

Samples, noise, timesteps and caption dropout of step n follow from the seed, n and a sample's place in the global batch:
not from what ran before, nor from how many processes share the batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from koala.data.captions.mixed import NewCaptions
from koala.data.latents import LatentSet
from koala.distill.config import DistillConfig
from koala.errors import KoalaError

Place = tuple[int, int, int]
"""A sample's step, its place in the global batch, and its index in the data set."""

_ORDER, _DRAW = 0, 1  # keep the two kinds of random stream apart


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one bucket."""

    samples: Tensor
    """B, indices in the data set."""
    latents: Tensor
    """B x 4 x h x w, scaled."""
    noise: Tensor
    """B x 4 x h x w."""
    timesteps: Tensor
    """B."""
    tokens: Tensor
    """B x 2 x T."""
    keep: Tensor
    """B, False where the caption is dropped."""
    time_ids: Tensor
    """B x 6, px."""

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return type(self)(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pin_memory(self) -> Self:
        """Return the batch in pinned memory."""
        return type(self)(**{name: value.pin_memory() for name, value in vars(self).items()})


Buckets = dict[tuple[int, int], np.ndarray]
"""Indices of the samples in each bucket, (height, width) in pixels."""


def too_small(buckets: Buckets, batch_size: int) -> dict[tuple[int, int], int]:
    """Return the buckets that fill no batch without repeating samples, with their counts of samples."""
    return {bucket: len(indices) for bucket, indices in buckets.items() if len(indices) < batch_size}


class Order:
    """The order of samples: which make up the global batch of a step.

    Every epoch shuffles each bucket, cuts it into batches of one bucket, and shuffles the batches. What is left of a bucket
    carries over: it opens the bucket's first batch of the next epoch. So each sample is seen once an epoch, but that fewer than
    `batch_size` of a bucket are seen an epoch later. A batch holds a sample twice only where its bucket has fewer samples than
    two batches.
    """

    def __init__(self, buckets: Buckets, batch_size: int, seed: int) -> None:
        """Order the samples of `buckets`, of which none is empty."""
        self._buckets = [numbers for _, numbers in sorted(buckets.items())]
        self._batch_size = batch_size
        self._seed = seed
        self._samples = sum(map(len, self._buckets))
        self._first = 0
        self._batches: list[np.ndarray] = []

    def at(self, step: int) -> np.ndarray:
        """Return the sample indices of step `step` (from 0): batch_size of them."""
        if not self._first <= step < self._first + len(self._batches):
            epoch = step * self._batch_size // self._samples
            while self.steps(epoch + 1) <= step:
                epoch += 1
            self._first, self._batches = self.steps(epoch), self._shuffle(epoch)
        return self._batches[step - self._first]

    def steps(self, epochs: int) -> int:
        """Return the steps of the first `epochs` epochs."""
        return sum(epochs * len(numbers) // self._batch_size for numbers in self._buckets)

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch.

        The permutations of a bucket, one an epoch, make an endless stream. Its k-th batch is at k * batch_size, and belongs to
        the epoch in which it ends.
        """
        random, drawn = self._draw(epoch)
        size = self._batch_size
        firsts = [epoch * len(numbers) // size * size for numbers in self._buckets]
        carried = self._carried(firsts, epoch)
        batches: list[np.ndarray] = []
        for fresh, first, left in zip(drawn, firsts, carried, strict=True):
            stop = (epoch + 1) * len(fresh) // size * size
            if stop > first:
                head = fresh[: stop - epoch * len(fresh)]
                # A sample that was carried over comes late in this epoch, not twice in one batch.
                again = np.isin(head, left)
                batches += list(np.concatenate([left, head[~again], head[again]]).reshape(-1, size))
        return [batches[index] for index in random.permutation(len(batches))]

    def _carried(self, firsts: Sequence[int], epoch: int) -> list[np.ndarray]:
        """Return what each bucket carries over into an epoch: its stream from `firsts` on. Small buckets collect for several."""
        carried = [numbers[:0] for numbers in self._buckets]
        oldest = min(first // len(numbers) for first, numbers in zip(firsts, self._buckets, strict=True))
        for earlier in range(oldest, epoch):
            for place, fresh in enumerate(self._draw(earlier)[1]):
                left = fresh[max(firsts[place] - earlier * len(fresh), 0) :]
                carried[place] = np.concatenate([carried[place], left])
        return carried

    def _draw(self, epoch: int) -> tuple[np.random.Generator, list[np.ndarray]]:
        """Return an epoch's permutation of each bucket, and the generator after them."""
        random = np.random.default_rng((self._seed, _ORDER, epoch))
        return random, [random.permutation(numbers) for numbers in self._buckets]


class MicroBatches(Sampler[list[Place]]):
    """The places of each micro-batch of one process, from step `start` to `stop`.

    Process r of p takes the r-th, the (p + r)-th, ... micro-batch of every global batch.
    """

    def __init__(self, order: Order, micro_batch: int, rank: int, processes: int, start: int, stop: int) -> None:
        """Remember whose micro-batches to yield."""
        self._order = order
        self._micro_batch = micro_batch
        self._rank, self._processes = rank, processes
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[list[Place]]:
        """Yield the places of one micro-batch after another."""
        for step in range(self._start, self._stop):
            numbers = self._order.at(step)
            stride = self._micro_batch * self._processes
            for first in range(self._rank * self._micro_batch, len(numbers), stride):
                yield [(step, place, int(numbers[place])) for place in range(first, first + self._micro_batch)]


class TrainingSet(Dataset[tuple[Any, ...]]):
    """Encoded samples with the noise, timestep and caption dropout of their place in training."""

    def __init__(
        self, data: LatentSet, config: DistillConfig, train_timesteps: int, new_captions: NewCaptions | None = None
    ) -> None:
        """Raise KoalaError for timesteps beyond the teacher's `train_timesteps`."""
        self._data = data
        self._new_captions = new_captions
        self._config = config
        self._timesteps = config.timesteps or tuple(range(train_timesteps))
        if max(self._timesteps) >= train_timesteps:
            raise KoalaError(
                f"distill.timesteps has {max(self._timesteps)}, where the teacher has 0 to {train_timesteps - 1}"
            )

    def __getitem__(self, place: Place) -> tuple[Any, ...]:
        """Return index, latent, noise, timestep, keep, caption and time ids of a place."""
        step, position, index = place
        sample = self._data[index]
        seed = np.random.SeedSequence((self._config.seed, _DRAW, step, position)).generate_state(2, np.uint32)
        random = torch.Generator().manual_seed(int(seed[0]) << 32 | int(seed[1]))
        timestep = self._timesteps[int(torch.randint(len(self._timesteps), (), generator=random))]
        keep = bool(torch.rand((), generator=random) >= self._config.caption_dropout)
        latent = sample.latent.float()
        noise = torch.randn(latent.shape, generator=random)
        # Drawn last: where there are no new captions, every other draw is as it was.
        renewed = bool(torch.rand((), generator=random) < self._config.recaption_share)
        new = self._new_captions[index] if renewed and self._new_captions else None
        return index, latent, noise, timestep, keep, new or sample.caption, sample.time_ids


def collate(items: Sequence[tuple[Any, ...]], tokenize: Callable[[Sequence[str]], Tensor]) -> Batch:
    """Return what `TrainingSet` gives for some places as a micro-batch."""
    indices, latents, noise, timesteps, keep, captions, time_ids = zip(*items, strict=True)
    return Batch(
        samples=torch.tensor(indices),
        latents=torch.stack(latents),
        noise=torch.stack(noise),
        timesteps=torch.tensor(timesteps),
        tokens=tokenize(captions),
        keep=torch.tensor(keep),
        time_ids=torch.tensor(time_ids),
    )


def load(
    data: LatentSet,
    buckets: Buckets,
    config: DistillConfig,
    tokenize: Callable[[Sequence[str]], Tensor],
    train_timesteps: int,
    micro_batch: int,
    rank: int,
    processes: int,
    start: int,
    device: torch.device,
    new_captions: NewCaptions | None = None,
) -> Iterator[Iterator[Batch]]:
    """Yield, for every step from `start`, this process's micro-batches on `device`; take all of them before the next step.

    buckets: The samples of `data` to train on.
    new_captions: Of the samples of `data`, for the share of them that `config` names.
    """
    accumulate = config.batch_size // (micro_batch * processes)

    order = Order(buckets, config.batch_size, config.seed)
    loader = DataLoader(
        TrainingSet(data, config, train_timesteps, new_captions),
        batch_sampler=MicroBatches(order, micro_batch, rank, processes, start, config.steps),
        collate_fn=partial(collate, tokenize=tokenize),
        num_workers=config.machine.workers,
        pin_memory=torch.cuda.is_available(),
    )
    batches = ahead(loader, device)
    for _ in range(start, config.steps):
        yield itertools.islice(batches, accumulate)


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Move batches to `device` one ahead of their use; on CUDA the copy overlaps with computation."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    following = None
    for batch in batches:
        ready, following = following, _copy(batch, device, stream)
        if ready is not None:
            yield _settle(ready, stream)
    if following is not None:
        yield _settle(following, stream)


def _copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> Batch:
    with torch.cuda.stream(stream):
        return batch.to(device)


def _settle(batch: Batch, stream: torch.cuda.Stream) -> Batch:
    """Make the current stream wait for the copy, and tell the allocator that it uses the other stream's tensors."""
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    for tensor in vars(batch).values():
        tensor.record_stream(current)
    return batch
