"""Loads params.yaml into frozen types. The types stand beside the code that uses them; the values in params.yaml.

    params = load()
    params.distill.steps
    params.out("distill", "koala-700m")     # artifacts/demo/distill/koala-700m

A section of the wrong shape anywhere in the chosen profile is refused here, before the first stage has done any work.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from koala.data.config import DownloadConfig, EncodeConfig, FilterConfig, SourceConfig
from koala.demo.config import TinyTeacherConfig
from koala.distill.config import DistillConfig
from koala.distill.features import feature_pairs
from koala.errors import KoalaError
from koala.evaluate.config import EvaluateConfig
from koala.publish.config import PublishConfig
from koala.section import Section
from koala.teacher import TeacherConfig
from koala.unet.blocks import StudentRule, keep
from koala.unet.reference import SDXL

PARAMS_FILE = Path("params.yaml")


class Profile(Section):
    """A complete configuration of the pipeline: one section a stage. requires: of the machine, see koala.requirements."""

    requires: tuple[Literal["cuda", "hub"], ...] = ()
    source: SourceConfig
    download: DownloadConfig
    filter: FilterConfig
    teacher: TeacherConfig
    encode: EncodeConfig
    distill: DistillConfig
    evaluate: EvaluateConfig
    publish: PublishConfig


class Params(Profile):
    """The chosen profile, its name, and the students' rules."""

    profile: str
    students: dict[str, StudentRule]

    def student(self, name: str) -> StudentRule:
        """The rule called `name`. Raises KoalaError with the names that can be had."""
        if name not in self.students:
            raise KoalaError(f"no student {name!r} in {PARAMS_FILE}: choose one of {', '.join(self.students)}")
        return self.students[name]

    def teacher_unet(self) -> Mapping[str, Any]:
        """The configuration of the teacher's U-Net: as its folder has it or, before there is one, as it will be made.

        A teacher on the Hub counts as SDXL until it is here.
        """
        file = self.out("teacher") / "unet" / "config.json"
        if file.is_file():
            return json.loads(file.read_text())
        return self.teacher.unet_config() if isinstance(self.teacher, TinyTeacherConfig) else SDXL

    def out(self, stage: str, student: str | None = None) -> Path:
        """The folder that a stage gives, as dvc.yaml names it."""
        folder = Path("artifacts", self.profile, stage)
        return folder / student if student else folder

    def need(self, stage: str, student: str | None = None) -> Path:
        """The folder of a stage that must have run. Raises KoalaError with the command that makes it."""
        folder = self.out(stage, student)
        if not folder.is_dir():
            target = f"{stage}@{student}" if student else stage
            raise KoalaError(
                f"{folder} is missing: run `dvc repro {target}` (or `koala {target.replace('@', ' ')}`) first"
            )
        return folder


def load(path: Path = PARAMS_FILE, profile: str | None = None) -> Params:
    """Read `path`; `profile` overrides the profile that it names.

    Raises KoalaError, in one line, where the file is missing, is not YAML, or does not fit the types.
    """
    document = _read(path)
    name = str(profile or document.get("profile"))
    profiles = document.get("profiles")
    if not isinstance(profiles, dict) or not profiles:
        raise KoalaError(f"{path} has no section 'profiles': restore it (git checkout {path})")
    if name not in profiles:
        raise KoalaError(f"{path} names the profile {name!r}: choose one of {', '.join(map(str, profiles))}")
    section = profiles[name]
    if not isinstance(section, dict):
        raise KoalaError(f"{path}: profiles.{name} must be a mapping of stages to parameters")
    try:
        params = Params(profile=name, students=document.get("students") or {}, **section)
    except ValidationError as error:
        raise KoalaError(_one_line(path, name, error)) from None
    _check_features(params, path)
    return params


def _check_features(params: Params, path: Path) -> None:
    """Every student must have every feature that distillation compares."""
    for name, rule in params.students.items():
        stages = keep(params.teacher_unet(), rule)
        try:
            feature_pairs(params.distill.features, stages)
        except KoalaError as error:
            raise KoalaError(f"{path}: profiles.{params.profile}.distill.features: {name}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise KoalaError(f"there is no {path} here: run koala in the project's folder") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise KoalaError(f"{path} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(document, dict):
        raise KoalaError(f"{path} must be a mapping with 'profile', 'profiles' and 'students'")
    return document


def _one_line(path: Path, profile: str, error: ValidationError) -> str:
    """The first few of pydantic's complaints, each with the parameter's full name."""
    complaints = []
    for complaint in error.errors()[:3]:
        names = [str(part) for part in complaint["loc"]]
        root = [] if names and names[0] == "students" else ["profiles", profile]
        what = (
            "no such parameter"
            if complaint["type"] == "extra_forbidden"
            else complaint["msg"].removeprefix("Value error, ")
        )
        complaints.append(f"{'.'.join(root + names)}: {what[0].lower()}{what[1:]}")
    more = error.error_count() - len(complaints)
    return f"{path}: " + "; ".join(complaints) + (f" (and {more} more)" if more else "")
