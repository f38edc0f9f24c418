"""Options of the process that img2dataset runs in (koala.data.workers), which the download starts."""

from pathlib import Path
from typing import Any

from koala.config import Config
from koala.data.decode import DecodeConfig
from koala.data.executor import Engine
from koala.data.fetch import FetchConfig


class WorkerOptions(Config):
    """Options of the process, as JSON on its command line."""

    engine: Engine
    """Place of the workers: this machine, or a Ray cluster."""
    fetch: FetchConfig
    """Limits and retries of a request."""
    allow: tuple[str, ...]
    """See DownloadConfig."""
    decode: DecodeConfig
    """Limits of an image that is decoded."""
    earlier: tuple[Path, Path] | None = None
    """Folder of what an earlier run downloaded, and its index."""
    img2dataset: dict[str, Any]
    """The arguments of `img2dataset.download`."""
