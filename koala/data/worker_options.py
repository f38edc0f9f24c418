"""What the download tells the process that img2dataset runs in (koala.data.workers)."""

from pathlib import Path
from typing import Any

from koala.config import Config
from koala.data.decode import DecodeConfig
from koala.data.executor import Engine
from koala.data.fetch import FetchConfig


class WorkerOptions(Config):
    """What the process is told."""

    engine: Engine
    """Where worker processes run."""
    fetch: FetchConfig
    """How an image is fetched."""
    allow: tuple[str, ...]
    """See DownloadConfig."""
    decode: DecodeConfig
    """How it is decoded."""
    earlier: tuple[Path, Path] | None = None
    """Folder of what an earlier run downloaded, and its index."""
    img2dataset: dict[str, Any]
    """The arguments of `img2dataset.download`."""
