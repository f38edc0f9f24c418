"""The stage `distill`: trains a student, and makes a pipeline folder of what training leaves."""

import shutil
from pathlib import Path

from PIL import Image

from koala.console import say
from koala.data.captions.mixed import align
from koala.distill import curves, remote_checkpoints
from koala.distill.config import DistillConfig
from koala.distill.job import FILE, NEW_CAPTIONS, UNET, VALIDATION, Job, checkpoints
from koala.distill.launch import launch
from koala.run import STATE, Run


def distill(
    config: DistillConfig, latents: Path, captions: Path, teacher: Path, student: Path, out: Path, run: Run
) -> None:
    """Distil `teacher` into `student` on encoded samples: `out` becomes the trained pipeline, with its curves.

    Training resumes from the newest checkpoint in the state folder, or at `config.machine.checkpoints`. Of a finished run
    at a constant rate the last checkpoint is kept, so that more steps continue it; of any other, `out` stays as it is.
    Raises KoalaError where the launch configuration cannot run the recipe, and SystemExit with the training's own status
    where that stopped.
    """
    state = out / STATE
    if _is_finished(out):
        shutil.rmtree(state, ignore_errors=True)
        return
    state.mkdir(parents=True, exist_ok=True)
    new_captions = _new_captions(config, captions, latents, state)
    job = Job(config=config, latents=latents, teacher=teacher, student=student, new_captions=new_captions, state=state)
    if not _is_trained(job):
        shutil.rmtree(job.state / UNET, ignore_errors=True)
        reporter = _Reporter(job.state, run)
        with remote_checkpoints.kept(config.machine, state) as push:

            def follow() -> None:
                reporter.report()
                push()

            launch(config, job.write(), follow=follow)
    shutil.copytree(student, out, ignore=_all_but_components, copy_function=shutil.copyfile, dirs_exist_ok=True)
    shutil.rmtree(out / "unet", ignore_errors=True)
    shutil.copytree(job.state / UNET, out / "unet")
    curves.write(job.state, out)
    run.artifact(out / curves.IMAGE)
    shutil.rmtree(job.state / VALIDATION, ignore_errors=True)
    continues = config.schedule == "constant"
    for old in checkpoints(job.state)[: -1 if continues else None]:
        shutil.rmtree(old)
    # The U-Net goes last and in one step: an interrupted call is repeated from all of it, or has ended.
    removed = (job.state / UNET).rename(job.state / f"{UNET}.partial")
    shutil.rmtree(removed if continues else job.state)


def _new_captions(config: DistillConfig, captions: Path, latents: Path, state: Path) -> Path | None:
    """Return the file of new captions, where a share of the samples is to be trained on them and there are some."""
    if not config.recaption_share:
        return None
    file = state / NEW_CAPTIONS
    if align(captions, latents, file):
        return file
    say(f"distill: {captions} holds no new captions: recaption_share {config.recaption_share} changes nothing")
    return None


def _is_trained(job: Job) -> bool:
    """Return whether an interrupted call left the U-Net of exactly this many steps."""
    file = job.state / FILE
    return (job.state / UNET).is_dir() and file.is_file() and Job.read(file).config.steps == job.config.steps


def _is_finished(out: Path) -> bool:
    """Return whether an interrupted call made all of `out` and left nothing to resume from, only its end to be removed."""
    state = out / STATE
    return (out / curves.IMAGE).is_file() and not (state / UNET).is_dir() and not checkpoints(state)


def _all_but_components(_folder: str, names: list[str]) -> set[str]:
    """Leave out the student's untrained U-Net, and the files that say how it was made."""
    return {name for name in names if name in ("unet", "provenance.json", "weight_map.json")}


class _Reporter:
    """Sends what rank 0 writes (losses, validation images) to the run; steps that it knows are not sent again."""

    def __init__(self, state: Path, run: Run) -> None:
        self._state, self._run = state, run
        # Steps that are repeated after a SIGKILL give the same losses.
        self._sent = run.last_step("loss/total")
        self._shown = run.last_step("loss/total")
        self._seen = (0, 0)

    def report(self) -> None:
        """Send what is new."""
        file = self._state / curves.HISTORY
        seen = (file.stat().st_ino, file.stat().st_size) if file.is_file() else (0, 0)
        if seen == self._seen:
            return
        self._seen = seen
        for image in sorted((self._state / VALIDATION).glob("[0-9]*.png")):
            if int(image.stem) > self._shown:
                self._run.image(Image.open(image), "validation", int(image.stem))
                self._shown = int(image.stem)
        for row in curves.read(self._state):
            if row["step"] > self._sent:
                self._run.metrics({name: value for name, value in row.items() if name != "step"}, step=row["step"])
                self._sent = row["step"]
