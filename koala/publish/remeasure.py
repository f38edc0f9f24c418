"""The champion measured again: new images of the prompts and seeds that it was released with, beside its own intervals."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from koala.errors import KoalaError
from koala.evaluate import extractors
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.generation import generate_images
from koala.evaluate.prompts import seeded_prompts
from koala.evaluate.statistics import STUDENT
from koala.evaluate.values import FILE as VALUES
from koala.evaluate.values import Values
from koala.publish.champion import Champion

_INDEX = "model_index.json"


def fallen(config: EvaluateConfig, champion: Champion, scores: Sequence[str]) -> list[str]:
    """Return a line for each score whose mean is below the 95 % interval in the release's metrics.json.

    Steps, guidance, dtype, count and seeds are those that the release pins. Weights are read from the target, one file in
    memory at a time.

    Args:
        config: Prompts, metrics, and how they are computed on this machine.
        champion: The release that stands.
        scores: Names of scores, such as `attributes/all`.

    Raises:
        KoalaError: The release was measured on other prompts or by other metrics, or a score cannot be measured alone.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _fetch(champion, folder)
        then = json.loads((folder / "metrics.json").read_text())
        pinned, intervals = then["pinned"], then["intervals"][STUDENT]
        sampling = config.sampling.model_copy(update={name: pinned[name] for name in ("steps", "guidance")})
        config = config.model_copy(
            update={"sampling": sampling, **{name: pinned[name] for name in ("count", "seed", "dtype")}}
        )
        prompts = seeded_prompts(config.prompts, config.count, config.seed)
        before = Values.read(folder / VALUES, f"{VALUES} of {champion.place}").prompts
        if [(each.text, each.seed) for each in prompts] != [(each.text, each.seed) for each in before]:
            raise KoalaError(
                f"watch.champion: {champion.place} was measured on other prompts than evaluate.prompts has"
            )
        images = generate_images(folder, prompts, config, folder / "images", f"measure {champion.place} again")
        values: dict[str, Sequence[float]] = {}
        for metric in config.metrics:
            if set(metric.names()) & set(scores):
                _same(metric.kind, metric.model_dump(mode="json", exclude={"kind"}), pinned["metrics"], champion.place)
                values |= metric.measure(images, prompts, None)
        extractors.forget()
    if missing := [name for name in scores if name not in values or name not in intervals]:
        raise KoalaError(
            f"watch.champion: {', '.join(missing)} of {champion.place} cannot be measured alone: leave it out"
        )
    means = {name: fmean(values[name]) for name in scores}
    return [
        f"{champion.place}: {name} {means[name]:.3f}, below its interval {intervals[name][0]:.3f} to {intervals[name][1]:.3f}"
        for name in scores
        if means[name] < intervals[name][0]
    ]


def _same(kind: str, now: Mapping[str, Any], then: Mapping[str, Any], place: str) -> None:
    """Raise KoalaError where a metric has other options than the release was measured with."""
    if then.get(kind) != now:
        raise KoalaError(
            f"watch.champion: {place} was measured by another metric {kind}: {then.get(kind)} (now {dict(now)})"
        )


def _fetch(champion: Champion, folder: Path) -> None:
    """Write the release's pipeline and its evaluation to `folder`."""
    index = champion.read(_INDEX)
    components = set(json.loads(index))
    for name in champion.shelf.manifest(champion.version).files:
        if name in (_INDEX, "metrics.json", VALUES) or name.partition("/")[0] in components:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(champion.read(name))
