"""Prompt sets and the seeds of their images."""

import pytest

from koala.demo.prompts import ShapesPrompts
from koala.errors import KoalaError
from koala.evaluate.prompts import FilePrompts, seeded_prompts


def test_prompts_are_cycled_and_each_has_its_own_seed(tmp_path) -> None:
    prompts = seeded_prompts(ShapesPrompts(), count=110, seed=7)
    assert prompts[0].text == prompts[108].text
    assert prompts[0].seed == 7
    assert prompts[108].seed == 115
    assert len({prompt.text for prompt in prompts}) == 108
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n a ship \n")
    own = seeded_prompts(FilePrompts(path=file), count=3, seed=0)
    assert [prompt.text for prompt in own] == ["a fox", "a ship", "a fox"]


def test_a_file_without_prompts_is_refused(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n")
    with pytest.raises(KoalaError, match="holds no prompt"):
        FilePrompts(path=file).load()
    with pytest.raises(KoalaError, match="not there"):
        FilePrompts(path=tmp_path / "nowhere.txt").load()
