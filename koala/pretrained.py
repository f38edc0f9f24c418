"""Models of transformers from the Hub at a pinned revision, or from a folder: safetensors and transformers' own classes only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from koala.console import hide_loading_bars
from koala.errors import DISK_FULL, KoalaError


class WrongModelError(ValueError):
    """Weights that are not those of the model; the text says what is wrong with them."""


def load(architecture: str, model: str, revision: str, setting: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Return a model in `eval` mode on the CPU, and its processor.

    Args:
        architecture: The name of a class of transformers.
        model: A Hub repository, or a folder.
        revision: The Hub commit.
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
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=dtype,
        )
        if lacking := info["missing_keys"]:  # transformers would leave them at random
            raise WrongModelError(f"it lacks {len(lacking)} tensors, {min(lacking)} among them")
        processor = transformers.AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    return loaded.eval(), processor


@contextmanager
def errors(architecture: str, model: str, revision: str, setting: str) -> Iterator[None]:
    """Raise KoalaError, in one line, where a model cannot be had or is not what it should be. Arguments as of `load`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error) if isinstance(error, WrongModelError) else type(error).__name__
        raise KoalaError(
            f"cannot load {model} at {revision} as a {architecture} for {setting} ({reason}): check the name and the "
            "revision, that it holds safetensors, and the network"
        ) from None
