"""Prompt sets: what images are generated from to measure a model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, zip_longest

from koala.config import Config


@dataclass(frozen=True)
class Written:
    """A prompt of a set."""

    text: str
    """What is asked for."""

    category: str = ""
    """What it asks of a model, such as `counts`; empty where the set has no categories."""

    chunks: tuple[str, ...] = ()
    """Its noun chunks, `a black cat`, about each of which a metric may ask."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and the seed of its image."""

    text: str
    seed: int
    category: str = ""
    chunks: tuple[str, ...] = ()


class PromptSet(Config, ABC):
    """A set of prompts; its kinds are subclasses."""

    kind: str
    """Name of the kind."""

    @abstractmethod
    def load(self) -> Sequence[Written]:
        """Return the prompts in their order, at least one."""


def seeded_prompts(prompts: PromptSet, count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts with the seeds `seed`, `seed + 1`, ...

    The categories take turns, so that any count has as many of each as it can. Where the set is longer than `count`, the
    prompts of a category are taken by the order of their SHA-256: a sample that depends neither on where a prompt stands in the
    file nor on the others. Where it is shorter, it is cycled.
    """
    loaded = prompts.load()
    of_category: dict[str, list[Written]] = {}
    for written in loaded:
        of_category.setdefault(written.category, []).append(written)
    if count < len(loaded):
        for category in of_category.values():
            category.sort(key=lambda written: sha256(written.text.encode()).digest())
    turns = [written for written in chain(*zip_longest(*of_category.values())) if written is not None]
    chosen = (turns[number % len(turns)] for number in range(count))
    return [Prompt(each.text, seed + number, each.category, each.chunks) for number, each in enumerate(chosen)]
