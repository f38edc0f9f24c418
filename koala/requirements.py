"""What a profile needs of the machine, checked before any work is done."""

import os
from collections.abc import Iterable

from koala.errors import KoalaError

# Stages that fetch: a machine that only trains needs no access to the Hub.
_FETCHING = ("source", "teacher")
_SECONDS = 5


def check(profile: str, requires: Iterable[str], stage: str) -> None:
    """Raise KoalaError, in one line, with all that is missing and what to do."""
    missing = []
    if "cuda" in requires and not _has_cuda():
        missing.append("a CUDA GPU (none is visible to torch)")
    if "hub" in requires and stage in _FETCHING and not _reaches_hub():
        missing.append(f"access to the Hugging Face Hub ({_endpoint()} does not answer)")
    if missing:
        raise KoalaError(
            f"profile {profile} needs {' and '.join(missing)}: run it on a machine that has both a GPU and the network, "
            "or set `profile: demo` in params.yaml, which needs neither"
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _reaches_hub() -> bool:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES"):
        return False
    try:
        urlopen(Request(_endpoint(), method="HEAD"), timeout=_SECONDS).close()
    except HTTPError:
        return True  # it answers
    except (URLError, OSError, ValueError):
        return False
    return True
