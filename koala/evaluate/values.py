"""The values of single images, as a table. By it, and by sample images, a later student is compared with this one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from koala.errors import KoalaError
from koala.evaluate.prompts import Prompt

FILE = "values.parquet"
SAMPLES = "samples"
"""Folder of the student's images that the grid shows. A file's name is the number of its row in the table: `000012.png`."""
SAMPLES_OF_TEACHER = f"{SAMPLES}/teacher"
"""Folder of its teacher's images of the same prompts and seeds."""


@dataclass(frozen=True)
class Values:
    """Each model's value of each image, in the order of the prompts."""

    prompts: Sequence[Prompt]
    """What the images were generated from."""

    scores: Mapping[str, Mapping[str, Sequence[float]]]
    """Model -> score -> value of each image."""

    def write(self, file: Path) -> None:
        """Write a parquet file: a row for each prompt and seed, and a column `MODEL/SCORE` for each score."""
        import pyarrow
        from pyarrow import parquet

        columns = {f"{model}/{name}": self.scores[model][name] for model in self.scores for name in self.scores[model]}
        table = pyarrow.table(
            {
                "prompt": pyarrow.array([prompt.text for prompt in self.prompts], pyarrow.string()),
                "seed": pyarrow.array([prompt.seed for prompt in self.prompts], pyarrow.int64()),
                **{name: pyarrow.array(values, pyarrow.float64()) for name, values in columns.items()},
            }
        )
        parquet.write_table(table, file)

    @classmethod
    def read(cls, file: Path | BinaryIO, origin: str) -> Self:
        """Read such a file. Raises KoalaError where it is none; `origin` names it."""
        import pyarrow
        from pyarrow import parquet

        try:
            columns = parquet.read_table(file).to_pydict()
            rows = zip(columns.pop("prompt"), columns.pop("seed"), strict=True)
            prompts = [Prompt(text, seed) for text, seed in rows]
        except (OSError, pyarrow.ArrowException, KeyError):
            raise KoalaError(f"{origin} is not a table of values: evaluate that student again") from None
        scores: dict[str, dict[str, Sequence[float]]] = {}
        for name, values in columns.items():
            model, _, score = name.partition("/")
            scores.setdefault(model, {})[score] = values
        return cls(prompts, scores)
