"""Disks that are full, and grow a little, again and again: a real file system of a few kB, or a real limit on files' sizes."""

from pathlib import Path

import pytest
from space import short_of_space
from stages import STAGES, digests, everything, run, samples

from koala.disk import naming_full_disk
from koala.errors import KoalaError


@pytest.mark.parametrize("how", ["disk", "files"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_goes_on_where_there_is_space_again(stage: str, how: str, stage_inputs: Path, out: Path) -> None:
    whole = Path("whole")
    whole.mkdir()
    run(stage, stage_inputs, whole)
    lines = []
    with short_of_space(out, how) as grow:
        while True:
            try:
                with naming_full_disk(out):
                    run(stage, stage_inputs, out)
                break
            except KoalaError as error:
                lines.append(str(error))
            assert len(lines) < 60
            grow()
        assert len(lines) > 1, "there was space enough from the first"
        for line in lines:
            assert line.startswith("the disk is full at "), line
            assert "\n" not in line
            assert str(out) in line
        assert digests(out) == digests(whole)
        assert samples(stage, out) == everything(stage)
