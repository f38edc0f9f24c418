"""Parameters of the stage `score`."""

from pathlib import Path
from typing import Self

from pydantic import Field, SerializeAsAny, model_validator

from koala.config import Config
from koala.data.executor import SharedWork
from koala.data.scores.base import EmbeddingScorer, Scorer
from koala.pretrained import PinnedModel


class Embedder(PinnedModel):
    """A model of the CLIP or SigLIP class by transformers. It embeds each image once, for all scores that use embeddings."""


class ScoreMachine(SharedWork):
    """Settings of scoring that change only its speed and memory."""

    batch_size: int = Field(default=32, gt=0)
    """Images of one forward pass."""
    threads: int = Field(default=4, gt=0)
    """Threads of each process that decode images ahead of the models."""
    processes: int = Field(default=1, gt=0)
    """Processes that share the shards; of several GPUs each takes its own."""
    cache: Path | None = None
    """Folder on a local disk that remembers, from run to run, what was computed of each image: of new shards only new images
    are computed. Left out: identical images are remembered within a run."""


class ScoreConfig(Config):
    """Which scores are computed. None by default: the stage then makes nothing, at once."""

    embedder: Embedder | None = None
    """Model that embeds images and captions, for the scores that use embeddings."""
    scorers: tuple[SerializeAsAny[Scorer], ...] = ()
    """Scores, a column each."""
    keep_embeddings: bool = True
    """Also keep the embedding of each image, in float16, where there is an embedder."""
    machine: ScoreMachine = ScoreMachine()
    """Settings of speed and memory."""

    @property
    def computes(self) -> bool:
        """Whether anything is computed."""
        return bool(self.scorers) or (self.embedder is not None and self.keep_embeddings)

    @model_validator(mode="after")
    def _embedder_is_named(self) -> Self:
        for scorer in self.scorers:
            if isinstance(scorer, EmbeddingScorer) and self.embedder is None:
                raise ValueError(f"{scorer.kind} uses embeddings: name a model under score.embedder")
        return self
