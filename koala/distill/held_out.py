"""Losses on samples that are kept out of training: what the student has learnt, and not learnt by heart.

Every held-out sample is measured at one timestep of each bin, with the same noise each time, so that a curve over steps shows
the student and no chance.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from koala.data.latents import LatentSet
from koala.distill.config import DistillConfig
from koala.distill.data import Batch, Buckets, collate
from koala.distill.trainer import Trainer
from koala.errors import KoalaError

_BINS = 4  # of a teacher's timesteps, unless the recipe names the few that it has
_STREAM = 2  # of random numbers, apart from those of koala.distill.data

Bin = tuple[str, Sequence[int]]
"""Name and timesteps of a bin."""


def split(data: LatentSet, config: DistillConfig) -> tuple[Buckets, Buckets]:
    """Return the samples that are trained on, and `config.held_out` others, drawn by the seed.

    Raises:
        KoalaError: There are no more samples than are held out.
    """
    if config.held_out >= len(data):
        raise KoalaError(f"distill.held_out {config.held_out} leaves none of {len(data)} samples to train on: lower it")
    random = np.random.default_rng((config.seed, _STREAM))
    held = np.zeros(len(data), dtype=bool)
    held[random.choice(len(data), config.held_out, replace=False)] = True
    return _where(~held, data.buckets), _where(held, data.buckets)


def _where(chosen: np.ndarray, buckets: Buckets) -> Buckets:
    """Return the chosen samples of each bucket; buckets without any are left out."""
    return {bucket: found for bucket, indices in buckets.items() if len(found := indices[chosen[indices]])}


def bins(config: DistillConfig, train_timesteps: int) -> list[Bin]:
    """Return four equal bins of a teacher's timesteps, `t0-249`, or each of the few that the recipe names, `t249`."""
    if config.timesteps:
        return [(f"t{timestep}", (timestep,)) for timestep in config.timesteps]
    edges = [train_timesteps * number // _BINS for number in range(_BINS + 1)]
    return [(f"t{low}-{high - 1}", range(low, high)) for low, high in itertools.pairwise(edges)]


def measure(
    trainer: Trainer,
    data: LatentSet,
    samples: Buckets,
    config: DistillConfig,
    tokenize: Callable[[Sequence[str]], Tensor],
    train_timesteps: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return the mean of each term over held-out samples, `held_out/TERM`, and in each bin, `held_out/TERM/BIN`.

    The student has the weights that are released, its captions are never dropped, and its layers are not compiled: the last
    micro-batch of a bucket has a shape of its own. Collective: the processes share the micro-batches.
    """
    names = bins(config, train_timesteps)
    size = trainer.micro_batch
    work = [
        (number, indices[first : first + size])
        for number in range(len(names))
        for _, indices in sorted(samples.items())
        for first in range(0, len(indices), size)
    ]
    rank, processes = accelerator.process_index, accelerator.num_processes
    rounds = -(-len(work) // processes)
    sums = torch.zeros(())
    with trainer.averaged():
        for place in range(rank, rounds * processes, processes):
            # A sharded student computes on all processes at once: one without work repeats some, and counts it for nothing.
            number, indices = work[place % len(work)]
            terms = trainer.measure(
                _batch(data, indices, number, names[number][1], config, tokenize).to(accelerator.device)
            )
            values = torch.stack([*terms.values(), torch.ones_like(terms["total"])])
            of_bin = torch.zeros(len(names), len(values), device=values.device)
            of_bin[number] = (len(indices) if place < len(work) else 0) * values
            sums = of_bin + sums.to(values.device)
    sums = accelerator.reduce(sums, "sum")
    means = sums[:, :-1] / sums[:, -1:]
    whole = dict(zip((f"held_out/{term}" for term in terms), means.mean(0).tolist(), strict=True))
    for (name, _), values in zip(names, means.tolist(), strict=True):
        whole |= {f"held_out/{term}/{name}": value for term, value in zip(terms, values, strict=True)}
    return whole


def _batch(
    data: LatentSet,
    indices: np.ndarray,
    number: int,
    timesteps: Sequence[int],
    config: DistillConfig,
    tokenize: Callable[[Sequence[str]], Tensor],
) -> Batch:
    """Return samples at a timestep of bin `number` each."""
    items = []
    for index in indices.tolist():
        sample = data[index]
        random = np.random.default_rng((config.seed, _STREAM, index, number))
        latent = sample.latent.float()
        noise = torch.from_numpy(random.standard_normal(latent.shape, dtype=np.float32))
        timestep = timesteps[int(random.integers(len(timesteps)))]
        items.append((index, latent, noise, timestep, True, sample.caption, sample.time_ids))
    return collate(items, tokenize)
