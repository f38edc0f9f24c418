"""Prompt sets: what images are generated from to measure a model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from koala.config import Config
from koala.errors import KoalaError


@dataclass(frozen=True)
class Prompt:
    """A prompt and the seed of its image."""

    text: str
    seed: int


class PromptSet(Config, ABC):
    """A set of prompts; its kinds are subclasses."""

    kind: str
    """Name of the kind."""

    @abstractmethod
    def load(self) -> list[str]:
        """Return the prompts in their order, at least one."""


class FilePrompts(PromptSet):
    """Prompts of a text file, one a line; empty lines are skipped."""

    kind: Literal["file"] = "file"
    """Name of the kind."""

    path: Path
    """The text file, relative to the current folder."""

    def load(self) -> list[str]:
        """Return the file's lines. Raises KoalaError where the file is missing or empty."""
        if not self.path.is_file():
            raise KoalaError(
                f"evaluate.prompts names {self.path}, which is not there: give a text file with a prompt a line"
            )
        lines = [line.strip() for line in self.path.read_text().splitlines() if line.strip()]
        if not lines:
            raise KoalaError(f"{self.path} (evaluate.prompts) holds no prompt: write one a line")
        return lines


def seeded_prompts(prompts: PromptSet, count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts, cycling through the set; prompt i has the seed `seed + i`."""
    texts = prompts.load()
    return [Prompt(texts[number % len(texts)], seed + number) for number in range(count)]
