"""SIGKILL at random moments, again and again: every stage ends with the bytes of a run that nothing interrupted."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
from forks import forks
from stages import IMAGES, STAGES, digests, everything, kept, run, samples

KILLS = 4


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Have the process that others are forked from import all of it, so that no run waits for that."""
    process = forks().Process(target=int)
    process.start()
    process.join()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again_a_stage_makes_the_same_bytes(stage: str, stage_inputs: Path, out: Path) -> None:
    whole = Path("whole").absolute()
    whole.mkdir()

    def begin(folder: Path) -> multiprocessing.process.BaseProcess:
        process = forks().Process(target=run, args=(stage, stage_inputs, folder.absolute()))
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
