"""The champion of a student: its release that stands. A challenger is compared with it by the values that travel with a release.

Nothing is generated again: both were evaluated on the same prompts and seeds, or they are not compared.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.errors import KoalaError
from koala.evaluate.prompts import Prompt
from koala.evaluate.statistics import STUDENT, share
from koala.evaluate.values import FILE as VALUES
from koala.evaluate.values import SAMPLES, SAMPLES_OF_TEACHER, Values
from koala.publish.config import PublishConfig
from koala.publish.gate import Comparison, Verdict, judge
from koala.publish.targets.base import Shelf, Target

if TYPE_CHECKING:
    from PIL.Image import Image

_HOW = ("confidence", "resamples")  # of `pinned`: how intervals are computed, not what was measured


@dataclass(frozen=True)
class Champion:
    """A release that stands."""

    place: str
    """The release in words, such as `koala-700m v3 (target folder)`."""
    version: str
    """Its version."""
    shelf: Shelf
    """Where its files are read."""

    def compare(self, evaluation: Path) -> Comparison:
        """Compare the student of `evaluation` in every score that both have, paired by prompt and seed."""
        ours = Values.read(evaluation / VALUES, str(evaluation / VALUES))
        try:
            theirs = Values.read(io.BytesIO(self.read(VALUES)), f"{VALUES} of {self.place}")
            then = self.read("metrics.json")
        except KoalaError as error:
            return Comparison({}, str(error))
        now = (evaluation / "metrics.json").read_bytes()
        try:
            different = _difference(json.loads(then)["pinned"], json.loads(now)["pinned"])
        except (ValueError, KeyError, TypeError):
            return Comparison({}, f"metrics.json of {self.place} does not say how it was measured")
        if ours.prompts != theirs.prompts or different:
            return Comparison({}, f"{self.place} was evaluated with {different or 'other prompts'}")
        prompts, one, other = [prompt.text for prompt in ours.prompts], ours.scores[STUDENT], theirs.scores[STUDENT]
        shares = {name: share(prompts, one[name], other[name]) for name in one if name in other}
        return Comparison(shares, itself=then == now)

    def beside(self, evaluation: Path, student: str) -> "Image | None":
        """Lay out teacher's, champion's and student's images of `evaluation`.

        None where the champion has none of them, or generated its own from other prompts or seeds.
        """
        from PIL import Image

        from koala.plots import grid

        files = sorted((evaluation / SAMPLES).glob("*.png"))
        theirs = [self.shelf.read(self.version, f"{SAMPLES}/{file.name}") for file in files]
        images = [Image.open(io.BytesIO(content)).convert("RGB") for content in theirs if content]
        if not files or len(images) < len(files):
            return None
        prompts = Values.read(evaluation / VALUES, str(evaluation / VALUES)).prompts
        if prompts != self._prompts():
            return None
        texts = [prompts[int(file.stem)].text for file in files]
        columns = {
            "teacher": _opened(evaluation / SAMPLES_OF_TEACHER / file.name for file in files),
            self.place: images,
            student: _opened(files),
        }
        return grid(texts, {name: column for name, column in columns.items() if column})

    def _prompts(self) -> Sequence[Prompt]:
        """Return what its images were generated from; nothing where it does not say so."""
        try:
            return Values.read(io.BytesIO(self.read(VALUES)), f"{VALUES} of {self.place}").prompts
        except KoalaError:
            return ()

    def read(self, file: str) -> bytes:
        """Return the content of a file of the release. Raises KoalaError where it has none of that name."""
        content = self.shelf.read(self.version, file)
        if content is None:
            raise KoalaError(f"{self.place} holds no {file}")
        return content


def _opened(files: Iterable[Path]) -> "list[Image]":
    """Return images from files; none where one is missing, as of an evaluation that kept no images of the teacher."""
    from PIL import Image

    there = list(files)
    return [Image.open(file).convert("RGB") for file in there] if all(file.is_file() for file in there) else []


def champion(config: PublishConfig, student: str) -> Champion | None:
    """Return the latest release of a student at the first target that keeps versions.

    None where there is none, and where no rule asks for it.
    """
    return standing(config.targets, student) if any(rule.of == "champion" for rule in config.require) else None


def standing(targets: Sequence[Target], student: str) -> Champion | None:
    """Return the latest release of a student at the first target that keeps versions; None where none stands."""
    for target in targets:
        if shelf := target.shelf(student):
            version = shelf.latest()
            return Champion(f"{student} {version} (target {target.kind})", version, shelf) if version else None
    return None


def verdicts_on(evaluation: Path, config: PublishConfig, standing: Champion | None) -> list[Verdict]:
    """Return the verdict of each rule on the student of `evaluation`, beside the champion where there is one."""
    metrics = json.loads((evaluation / "metrics.json").read_text())
    return judge(metrics, config.require, standing.compare(evaluation) if standing else None)


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what was pinned otherwise, `steps 20 (now 25)`; empty for nothing. A metric that one of them lacks is no matter."""
    kinds = sorted(then.get("metrics", {}).keys() & now.get("metrics", {}).keys())
    before, after = _comparable(then, kinds), _comparable(now, kinds)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)} (now {after.get(name)})" for name in names)


def _comparable(pinned: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Return what must be equal: how images were generated, and the options of the metrics `kinds`."""
    images = {name: value for name, value in pinned.items() if name not in ("metrics", *_HOW)}
    return images | {kind: pinned["metrics"][kind] for kind in kinds}
