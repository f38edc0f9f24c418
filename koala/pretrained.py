"""Models of transformers from the Hub at a pinned revision, or from a folder: safetensors and transformers' own classes only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from koala.config import Config
from koala.console import hide_loading_bars
from koala.errors import DISK_FULL, KoalaError

_MAIN = "main"  # transformers' own default, which says nothing of a folder
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class WrongModelError(ValueError):
    """Weights that are not those of the model; the text says what is wrong with them."""


class PinnedModel(Config):
    """A model of the Hub at a commit, or one in a folder."""

    model: str
    """A Hub repository, or a folder. Only safetensors are read."""

    revision: str | None = None
    """The Hub commit of the model, 40 hexadecimal digits, pinned so that scores stay comparable. A folder has none."""

    @model_validator(mode="after")
    def _is_pinned(self) -> Self:
        check_pinned(self.model, self.revision)
        return self


def check_pinned(model: str, revision: str | None) -> None:
    """Raise ValueError for a model of the Hub without a commit: a branch moves, and scores with it."""
    if not _HUB_NAME.fullmatch(model) or _COMMIT.fullmatch(revision or "") or Path(model).is_dir():
        return
    raise ValueError(
        f"{model} is no folder here, and its revision on the Hub must be a commit, 40 hexadecimal digits, not {revision}: see "
        f"`git ls-remote https://huggingface.co/{model} {revision or 'HEAD'}`"
    )


def find(model: str, revision: str | None, file: str, setting: str) -> None:
    """Look for a model by one of its files, which is not fetched.

    Args:
        model: A Hub repository, or a folder.
        revision: The Hub commit; None of a folder.
        file: Name of the file.
        setting: The parameter that names the model, for the error.

    Raises:
        KoalaError: It is neither there nor in the cache.
    """
    from httpx2 import HTTPError
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    folder = Path(model)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise KoalaError(f"{model} ({setting}) has no {file}: give the folder of a model, or a Hub repository")
        return
    missing = f"there is no folder {model} ({setting}): give that of a model, or a Hub repository with its revision"
    if revision is None:
        raise KoalaError(missing)
    try:
        if not isinstance(try_to_load_from_cache(model, file, revision=revision), str):
            get_hf_file_metadata(hf_hub_url(model, file, revision=revision))
    except HFValidationError:
        raise KoalaError(missing) from None
    except RemoteEntryNotFoundError:
        raise KoalaError(f"{model} at {revision} ({setting}) has no {file}: choose another model") from None
    except (OSError, HTTPError) as error:  # the Hub's own errors are OSErrors
        raise KoalaError(
            f"cannot find {model} at {revision} on the Hugging Face Hub, for {setting} ({type(error).__name__}): check "
            "the name, the revision and the network, or give a folder"
        ) from None


def load(architecture: str, model: str, revision: str | None, setting: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Return a model in `eval` mode on the CPU, and its processor.

    Args:
        architecture: The name of a class of transformers.
        model: A Hub repository, or a folder.
        revision: The Hub commit; None of a folder.
        setting: The parameter that names the model, for the error.
        dtype: Type of the weights.

    Raises:
        KoalaError: It cannot be had, holds no safetensors, or is another model.
    """
    import transformers

    hide_loading_bars()
    with errors(architecture, model, revision, setting):
        loaded, info = getattr(transformers, architecture).from_pretrained(
            model,
            revision=revision or _MAIN,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=dtype,
        )
        if lacking := info["missing_keys"]:  # transformers would leave them at random
            raise WrongModelError(f"it lacks {len(lacking)} tensors, {min(lacking)} among them")
        processor = transformers.AutoProcessor.from_pretrained(
            model, revision=revision or _MAIN, trust_remote_code=False
        )
    return loaded.eval(), processor


@contextmanager
def errors(architecture: str, model: str, revision: str | None, setting: str) -> Iterator[None]:
    """Raise KoalaError, in one line, where a model cannot be had or is not what it should be. Arguments as of `load`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error) if isinstance(error, WrongModelError) else type(error).__name__
        place = f"{model} at {revision}" if revision else model
        raise KoalaError(
            f"cannot load {place} as a {architecture} for {setting} ({reason}): check the name and the revision, that it "
            "holds safetensors, and the network"
        ) from None
