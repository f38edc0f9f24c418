"""Folders of small students, each made once."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from publish.small import STUDENTS, small_pipeline

from koala.unet.student import build_student


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small student by the name of its rule."""

    @cache
    def make(name: str) -> Path:
        folder: Path = tmp_path_factory.mktemp("students") / name
        pipeline = copy.copy(small_pipeline())
        pipeline.unet = build_student(pipeline.unet, STUDENTS[name])
        pipeline.save_pretrained(folder, safe_serialization=True)
        return folder

    return make
