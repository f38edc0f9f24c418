"""SIGKILL at random moments, again and again: every stage ends with the bytes of a run that nothing interrupted."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
from stages import IMAGES, STAGES, digests, everything, kept, run, samples

KILLS = 12
# Processes are forked from one that has imported all of it, and has started no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "PIL.AvifImagePlugin",
        "PIL.BmpImagePlugin",
        "PIL.GifImagePlugin",
        "PIL.JpegImagePlugin",
        "PIL.PngImagePlugin",
        "PIL.PpmImagePlugin",
        "PIL.WebPImagePlugin",
        "diffusers.models.autoencoders.autoencoder_kl",
        "duckdb",
        "koala.data.captions.captioner",
        "koala.data.encode",
        "koala.data.filter",
        "koala.data.recaption",
        "koala.data.score",
        "koala.data.scores.clip_similarity",
        "koala.data.scores.embedder",
        "koala.data.scores.models",
        "koala.data.source",
        "koala.data.table_reader",
        "koala.data.tables",
        "matplotlib.backends.backend_agg",
        "pandas",
        "polars",
        "pyarrow.dataset",
        "transformers.models.bert.tokenization_bert",
        "transformers.models.blip.image_processing_pil_blip",
        "transformers.models.blip.modeling_blip",
        "transformers.models.blip.processing_blip",
        "transformers.models.clip.image_processing_pil_clip",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.processing_clip",
        "transformers.models.clip.tokenization_clip",
    ]
)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Have the process that others are forked from import all of it, so that no run waits for that."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again_a_stage_makes_the_same_bytes(stage: str, stage_inputs: Path, out: Path) -> None:
    whole = Path("whole").absolute()
    whole.mkdir()

    def begin(folder: Path) -> multiprocessing.process.BaseProcess:
        process = CONTEXT.Process(target=run, args=(stage, stage_inputs, folder.absolute()))
        process.start()
        return process

    began = time.monotonic()
    uncut = begin(whole)
    uncut.join()
    seconds = time.monotonic() - began
    assert uncut.exitcode == 0
    assert samples(stage, whole) == everything(stage)
    expected = digests(whole)

    chance, kills, ended = random.Random(stage), 0, False
    while kills < KILLS or not ended:
        process = begin(out)
        if kills < KILLS:
            process.join(chance.uniform(0, seconds))
            kills += process.is_alive()
            process.kill()
        process.join(60)
        ended = process.exitcode == 0
        assert ended or process.exitcode == -9
        if ended:
            assert digests(out) == expected
            shutil.rmtree(out)
            out.mkdir()


def test_the_filter_keeps_each_sample_once(stage_inputs: Path, out: Path) -> None:
    """Of each pair of near duplicates the larger one stays."""
    run("filter", stage_inputs, out)
    assert list(kept(out)) == [f"{number:09d}" for number in range(0, IMAGES, 2)]
