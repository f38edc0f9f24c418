"""Runs one stage: reads its parameters and inputs, keeps its work in progress, and moves what it made into place.

    job = prepare("encode")             # refuses, before any heavy import, what cannot work
    from koala.data.encode import encode
    job.run(encode)

dvc.yaml says which artifacts a stage reads and which it makes: a dep `artifacts/demo/latents` becomes the argument
`latents`. Work in progress lies in runs/STAGE/KEY/out, where KEY follows from the stage's recipe and the content of its
inputs: a stage that was interrupted finds it again. Stages that work by row also find, in their state, what they made last of
other rows, by the same recipe, code and other inputs (koala.previous). Nobody but the runner knows of these folders.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from koala import params as parameters
from koala import previous, provenance, requirements
from koala.config import Config
from koala.console import say
from koala.disk import naming_full_disk
from koala.errors import KoalaError, line_of
from koala.params import Params
from koala.run import EARLIER, STATE

GRAPH = Path("dvc.yaml")
ARTIFACTS = "artifacts"
WORK = Path("runs")
HASHES = WORK / "hashes.sqlite"
_JUDGED = ("reference", "evaluate", "publish")  # their images are what the gate decides by
_FINISHED = "finished"  # marks a work folder whose artifact is in place, and whose state stays for more of the same


@dataclass(frozen=True)
class _ByRow:
    """What a stage that works by row takes over of what it made last."""

    others: frozenset[str]
    """Inputs and files that may be others than then."""
    parts: tuple[str, ...] = ("",)
    """Beginnings of the names of the files that it reads."""


_BY_ROW = {
    "download": _ByRow(frozenset({"table"})),
    "filter": _ByRow(frozenset({"images", "scores", "forget.yaml"}), ("manifest.json", "verdicts/", "judged/")),
    "encode": _ByRow(frozenset({"kept"})),
}


@dataclass(frozen=True)
class Job:
    """A stage that is ready to run."""

    params: Params
    stage: str
    student: str | None
    config: Config
    inputs: Mapping[str, Path]
    """Folders of the artifacts that it reads, by noun."""
    artifact: Path
    """The folder that it makes."""
    code: tuple[Path, ...] = ()
    """Files, beside artifacts, that decide what it makes."""

    @property
    def name(self) -> str:
        """The stage's name as DVC has it: `distill@koala-700m`."""
        return f"{self.stage}@{self.student}" if self.student else self.stage

    def hashes(self) -> dict[str, str]:
        """Return the hash of each input's content."""
        return {noun: provenance.content_hash(folder, HASHES) for noun, folder in self.inputs.items()}

    def work(self, hashes: Mapping[str, str]) -> Path:
        """Return the folder of work in progress, which every run of the same recipe over the same inputs shares."""
        parts = {"config": self.config.resume_key(), "inputs": dict(hashes), "artifact": self.artifact.as_posix()}
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return WORK / self.stage / (self.student or "") / key

    def run(self, function: Callable[..., None]) -> None:
        """Run the stage's function and move what it made to `artifact`, in one step.

        Raises whatever the function raises. The work folder then stays, and the next run resumes it.
        """
        from koala import tracking

        hashes = self.hashes()
        work = self.work(hashes)
        work.mkdir(parents=True, exist_ok=True)
        tags = {"stage": self.stage, "profile": self.params.profile, "machine": self.params.machine}
        tags |= {"student": self.student} if self.student else {}
        tags |= {f"data_hash.{noun}": found for noun, found in hashes.items()}
        experiment, values = f"koala-{self.params.profile}", {self.stage: self.config.recipe()}
        inputs = {folder: hashes[noun] for noun, folder in self.inputs.items()}
        with (
            naming_full_disk(work, self.artifact.parent, Path()),
            _alone(work),
            tracking.stage_run(experiment, self.name, values, tags, work, inputs) as run,
        ):
            out = work / "out"
            out.mkdir(exist_ok=True)
            if (work / STATE).is_dir():  # killed between the two moves of `_publish`
                os.replace(work / STATE, out / STATE)
            self._say_of_others(work)
            (work / _FINISHED).unlink(missing_ok=True)
            (work / "recipe.json").write_text(json.dumps(self.config.recipe(), indent=2) + "\n")
            self._offer_earlier(out, hashes)
            function(self.config.of_work(work.relative_to(WORK).as_posix()), **self.inputs, out=out, run=run)
            shutil.rmtree(out / STATE / EARLIER, ignore_errors=True)
            made_by = self._publish(work, out, hashes, run.id)
            run.artifact(self.artifact / provenance.FILE)
            run.tags({"data_hash": made_by["content"]})

    def help(self, machine_rank: int) -> None:
        """Run this machine's part of a training that another machine, of rank 0, runs as its stage.

        The work folder is on a disk that the machines share.
        """
        from koala.distill.config import DistillConfig
        from koala.distill.job import FILE
        from koala.distill.launch import launch

        assert isinstance(self.config, DistillConfig)
        state = self.work(self.hashes()).resolve() / "out" / STATE
        launch(self.config, state / FILE, machine_rank)

    def _publish(self, work: Path, out: Path, hashes: Mapping[str, str], run_id: str) -> dict[str, Any]:
        """Make `out` the artifact, with its provenance. Its resume state stays in the work folder, where there is some.

        Where the last run of the same recipe over the same inputs made the same content, its provenance stands: the
        artifact is the same to the byte, and DVC does not rerun what follows.
        """
        state = out / STATE
        kept = work / STATE
        if state.is_dir() and any(state.iterdir()):
            os.replace(state, kept)
        else:
            shutil.rmtree(state, ignore_errors=True)
        made_by: dict[str, Any] = {
            "stage": self.stage,
            "student": self.student,
            "profile": self.params.profile,
            "config": self.config.recipe(),
            "inputs": dict(hashes),
            "content": provenance.content_hash(out, HASHES),
        }
        last = provenance.read(work.parent)
        now = {"commit": provenance.git_commit(), "run_id": run_id}
        made_by |= {name: last[name] for name in now} if last.items() >= made_by.items() else now
        provenance.write(out, made_by)
        provenance.write(work.parent, made_by)
        move(out, self.artifact)
        if kept.is_dir():
            out.mkdir()
            os.replace(kept, state)
            (work / _FINISHED).touch()
        else:
            shutil.rmtree(work)
        return made_by

    def _offer_earlier(self, out: Path, hashes: Mapping[str, str]) -> None:
        """Link what the stage made last into its state, if that was of other rows: who makes the same again wants it made."""
        folder = out / STATE / EARLIER
        shutil.rmtree(folder, ignore_errors=True)
        by_row = _BY_ROW.get(self.stage)
        last = previous.find(self.name, self.artifact) if by_row else None
        if not by_row or not last:
            return
        code = {path for path in last.changed(self.code) if not _is_artifact(path)}
        if not code <= by_row.others:
            return
        try:
            with last.opened() as files:
                then, now = json.loads(files.read(provenance.FILE)), self.config.recipe()
                changed = code | {noun for noun in hashes if hashes[noun] != then["inputs"].get(noun)}
                same_rows = self.config.of_rows(now) == self.config.of_rows(then["config"])
                if same_rows and changed <= by_row.others and (changed or now != then["config"]):
                    files.link(folder, by_row.parts)
        except Exception as error:  # what stands behind a remote has errors of its own
            shutil.rmtree(folder, ignore_errors=True)
            say(f"{self.name}: what was made last cannot be had ({line_of(error)}): all rows are made")

    def _say_of_others(self, work: Path) -> None:
        """Name unfinished work of this stage that another recipe or other inputs have left, since it is not resumed."""
        for other in sorted(work.parent.iterdir()):
            file = other / "recipe.json"
            unfinished = not (other / _FINISHED).exists() and any((other / "out" / STATE).glob("*"))
            if other != work and file.is_file() and unfinished:
                differs = difference(json.loads(file.read_text()), self.config.recipe())
                say(
                    f"{self.name}: {other} holds work of {'another recipe: ' + differs if differs else 'other inputs'}; "
                    "it will not be resumed: restore that to resume it, or remove the folder"
                )


def prepare(stage: str, student: str | None = None) -> Job:
    """Return a stage that can run.

    Raises KoalaError for parameters that do not fit, an unknown student, an input that is not there, and a machine
    that lacks what the profile needs.
    """
    params = parameters.load()
    if params.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(params.threads))  # read once, when torch is imported
    if student is not None:
        params.student(student)
    declared = _graph()[stage]
    inputs, code = {}, list[Path]()
    for dep in declared.get("deps", ()):
        if _is_artifact(dep):
            folder = _expand(dep, params.profile, student)
            if not folder.is_dir():
                raise KoalaError(f"{folder} is missing: run {_maker(folder, params.profile, student)} first")
            inputs[folder.parts[2]] = folder
        else:
            code.append(Path(dep))
    requirements.check(params.profile, params.requires, stage)
    if stage in _JUDGED:
        for line in params.recipe.unresolved():
            say(line)
    made = _made(declared, params.profile, student)
    return Job(params, stage, student, params.config(stage, student), inputs, made, tuple(code))


def artifact(noun: str, student: str | None = None, profile: str | None = None) -> Path:
    """Return the folder of an artifact of a profile; left out, of the one that params.yaml names."""
    return Path(ARTIFACTS, profile or parameters.load().profile, noun, student or "")


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the parameters whose values differ: `learning_rate 1e-05 (now 2e-05), ...`; empty where none do."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in names)


def move(folder: Path, to: Path) -> None:
    """Put a folder in another's place, also from another file system; what was there is removed.

    Until it is in place, `folder` is whole where it was: a call that is killed loses nothing, and can be repeated.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    partial, old = to.with_name(f".{to.name}.partial"), to.with_name(f".{to.name}.old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    source = folder if _renames(folder.parent, partial) else Path(shutil.copytree(folder, partial))
    if to.exists():
        os.replace(to, old)
    os.replace(source, to)
    for left in (old, folder):
        shutil.rmtree(left, ignore_errors=True)


def _renames(folder: Path, to: Path) -> bool:
    """Return whether a folder in `folder` can be renamed to `to`, which does not exist: not to another file system."""
    probe = Path(tempfile.mkdtemp(dir=folder))
    try:
        os.replace(probe, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        probe.rmdir()
        return False
    to.rmdir()
    return True


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Hold the work folder. Raises KoalaError where another process holds it."""
    with (work / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KoalaError(
                f"{work} is in use by another run of this stage: wait for it, or stop it, and run the same command again"
            ) from None
        yield


def _graph() -> dict[str, dict[str, Any]]:
    """Return what dvc.yaml says of each stage, or of each student's where it has one."""
    try:
        stages = yaml.load(GRAPH.read_text(), Loader=yaml.CSafeLoader)["stages"]
    except FileNotFoundError:
        raise KoalaError(f"there is no {GRAPH} here: run koala in the project's folder") from None
    return {stage: {**declared, **declared.get("do", {})} for stage, declared in stages.items()}


def _is_artifact(path: Any) -> bool:
    return str(path).startswith(f"{ARTIFACTS}/")


def _expand(path: str, profile: str, student: str | None) -> Path:
    return Path(path.replace("${profile}", profile).replace("${key}", student or ""))


def _made(declared: Mapping[str, Any], profile: str, student: str | None) -> Path:
    """Return the folder that holds all outs of a stage: artifacts/PROFILE/NOUN, or artifacts/PROFILE/NOUN/STUDENT."""
    outs = [*declared.get("outs", ()), *declared.get("metrics", ()), *declared.get("plots", ())]
    first = outs[0] if isinstance(outs[0], str) else next(iter(outs[0]))
    return Path(*_expand(first, profile, student).parts[: 4 if student else 3])


def _maker(folder: Path, profile: str, student: str | None) -> str:
    """Return the commands that make an artifact."""
    for stage, declared in _graph().items():
        who = student if "foreach" in declared else None
        if ("foreach" not in declared or student) and _made(declared, profile, who) == folder:
            return f"`dvc repro {stage}{'@' + who if who else ''}` (or `koala {stage}{' ' + who if who else ''}`)"
    return "`dvc repro`"
