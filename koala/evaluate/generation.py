"""Generation of a model's images of the evaluation prompts, in this process or shared by several.

Several processes need nothing of each other: what is missing is known before they start, each loads the model and generates
every n-th batch, and each file appears in one step.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from koala import generate
from koala.config import Config
from koala.console import progress
from koala.errors import KoalaError
from koala.evaluate.config import EvaluateConfig, SamplingConfig
from koala.evaluate.images import Images, image_file, prepare
from koala.evaluate.prompts import Prompt
from koala.process import guarded, last_line

_POLL_SECONDS = 0.2


def generate_images(model: Path, prompts: Sequence[Prompt], config: EvaluateConfig, folder: Path, label: str) -> Images:
    """Generate the images that `folder` lacks, batch by batch; none is generated twice.

    Images of other prompts or settings are removed from `folder` first. Each file appears in one step. The caller keeps
    a folder a model: which model made an image is not recorded.

    Args:
        model: A pipeline folder; it is loaded only if an image is missing.
        prompts: An image each.
        config: Sampling, type and batch size.
        folder: Where the images are kept.
        label: Heading of the progress bar.
    """
    prepare(folder, prompts, config)
    missing = [number for number in range(len(prompts)) if not image_file(folder, number).is_file()]
    size, processes = config.machine.batch_size, config.machine.processes
    if missing and processes > 1:
        _generate_shares(model, prompts, missing, config, folder, label)
    elif missing:
        batches = [missing[first : first + size] for first in range(0, len(missing), size)]
        _generate_batches(model, prompts, progress(batches, label), config.sampling, config.dtype, folder)
    return Images(folder, len(prompts))


def _generate_batches(
    model: Path,
    prompts: Sequence[Prompt],
    batches: Iterable[Sequence[int]],
    sampling: SamplingConfig,
    dtype: str,
    folder: Path,
) -> None:
    """Generate the images of batches of numbers with one model, in this process. Each file appears in one step."""
    pipeline = generate.load(model, dtype)
    for batch in batches:
        seeded = [(prompts[number].text, prompts[number].seed) for number in batch]
        for number, image in zip(batch, generate.generate(pipeline, seeded, sampling), strict=True):
            partial = image_file(folder, number).with_suffix(".partial")
            image.save(partial, format="PNG")
            partial.rename(image_file(folder, number))
    del pipeline
    generate.free_memory()  # before the next model is loaded


class Share(Config):
    """What one process generates."""

    model: Path
    """The pipeline's folder."""
    folder: Path
    """Where the images go."""
    rank: int
    """The process's number, by which it takes a GPU."""
    batches: tuple[tuple[int, ...], ...]
    """Numbers of the images, batch by batch."""
    prompts: tuple[tuple[str, int], ...]
    """All prompts with their seeds."""
    sampling: SamplingConfig
    """Steps and guidance."""
    dtype: str
    """Type in which images are generated."""


def _generate_shares(
    model: Path, prompts: Sequence[Prompt], missing: Sequence[int], config: EvaluateConfig, folder: Path, label: str
) -> None:
    """Generate the images of the numbers `missing` in `config.machine.processes` processes.

    Args:
        model: The pipeline's folder.
        prompts: All prompts.
        missing: Numbers of the images to generate.
        config: Sampling, type, batch size and number of processes.
        folder: Where the images go.
        label: Heading of the progress bar.

    Raises:
        KoalaError: A process ended before its work. Finished images stay.
    """
    # Smaller batches rather than idle processes.
    processes = min(config.machine.processes, len(missing))
    size = min(config.machine.batch_size, -(-len(missing) // processes))
    batches = [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as running:
        workers = []
        for rank in range(processes):
            share = Share(
                model=model.resolve(),
                folder=folder.resolve(),
                rank=rank,
                batches=tuple(batches[rank::processes]),
                prompts=tuple((prompt.text, prompt.seed) for prompt in prompts),
                sampling=config.sampling,
                dtype=config.dtype,
            )
            file, log = Path(work, f"{rank}.json"), Path(work, f"{rank}.log")
            file.write_text(share.model_dump_json())
            command = [sys.executable, "-m", "koala.evaluate.generation", str(file)]
            workers.append((running.enter_context(guarded(command, log)), log))
        waiting = {image_file(folder, number) for number in missing}
        for _ in progress(_finished(waiting, workers), label, len(missing)):
            pass


def _finished(waiting: set[Path], workers: list[tuple[subprocess.Popen[bytes], Path]]) -> Iterator[Path]:
    """Yield each file of `waiting` once it is there."""
    while waiting:
        over = [(process.poll(), log) for process, log in workers]
        done = {file for file in waiting if file.is_file()}
        waiting -= done
        yield from done
        for status, log in over:
            if status:
                raise KoalaError(f"a process that generates images ended with status {status}: {last_line(log)}")
        if waiting and all(status == 0 for status, _ in over):
            raise KoalaError(f"the processes that generate images left {len(waiting)} out: run the same command again")
        time.sleep(_POLL_SECONDS)


def main(file: Path) -> None:
    """Generate the images of one process."""
    import torch

    share = Share.model_validate_json(file.read_text())
    if torch.cuda.is_available():
        torch.cuda.set_device(share.rank % torch.cuda.device_count())
    prompts = [Prompt(text, seed) for text, seed in share.prompts]
    _generate_batches(share.model, prompts, share.batches, share.sampling, share.dtype, share.folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
