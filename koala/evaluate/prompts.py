"""The prompts that models are measured on."""

from dataclasses import dataclass
from pathlib import Path

from koala.demo.shapes import ALL_ATTRIBUTES, Attributes, describe
from koala.errors import KoalaError
from koala.evaluate.config import EvaluateConfig


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its picture, and, where it is one of the demo's, what it asks for."""

    text: str
    seed: int
    asked: Attributes | None = None


def load_prompts(config: EvaluateConfig) -> list[Prompt]:
    """`count` prompts, those that there are in turn; picture i has the seed `seed + i`.

    Raises KoalaError where the file of prompts is missing or empty.
    """
    chosen: list[tuple[str, Attributes | None]]
    if config.prompts == "shapes":
        chosen = [(describe(attributes), attributes) for attributes in ALL_ATTRIBUTES]
    else:
        chosen = [(line, None) for line in _lines(Path(config.prompts))]
    turns = (chosen[number % len(chosen)] for number in range(config.count))
    return [Prompt(text, config.seed + number, asked) for number, (text, asked) in enumerate(turns)]


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise KoalaError(f"evaluate.prompts names {file}, which is not there: give a text file with a prompt a line")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise KoalaError(f"{file} (evaluate.prompts) holds no prompt: write one a line")
    return lines
