"""The stage `publish`: a student that passes the gate becomes a release folder with card, metrics and provenance."""

import json
import shutil
from typing import TYPE_CHECKING, Any

from koala.console import say
from koala.errors import KoalaError
from koala.provenance import data_hash
from koala.publish import card
from koala.publish.gate import shortfalls
from koala.tracking import hash_tags
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun

_FROM_EVALUATION = ("metrics.json", "grid.png")


def run(params: "Params", run: "StageRun", student: str) -> None:
    """Put `release/` and `receipt.json` at `params.out("publish", student)`.

    Raises KoalaError where the student misses a threshold: nothing is released then.
    """
    trained, evaluated = params.need("distill", student), params.need("evaluate", student)
    run.tags(hash_tags(distill=trained, evaluate=evaluated))
    metrics = json.loads((evaluated / "metrics.json").read_text())
    derived = {name: value for name, value in metrics.items() if isinstance(value, float)}
    if short := shortfalls({**metrics["after"], **derived}, params.publish.require):
        run.tags({"released": "no"})
        raise KoalaError(
            f"{student} is not released: {'; '.join(short)} (publish.require): train it longer, or lower the threshold"
        )

    work = resume_folder("publish", student=student, inputs=[data_hash(trained), data_hash(evaluated)])
    release = work / "release"
    shutil.rmtree(release, ignore_errors=True)
    shutil.copytree(trained, release, ignore=shutil.ignore_patterns("weight_map.json", "kept.json", "curves.*"))
    for name in _FROM_EVALUATION:
        shutil.copyfile(evaluated / name, release / name)
    provenance: dict[str, Any] = json.loads((trained / "provenance.json").read_text())
    table = (evaluated / "summary.md").read_text()
    card.write(release, card.render(student, metrics, derived, provenance, table, params.publish))
    receipt = {
        "student": student,
        "released": True,
        "run_id": provenance["run_id"],
        "commit": provenance["commit"],
        "required": params.publish.require,
        "hash": {"distill": data_hash(trained), "evaluate": data_hash(evaluated)},
    }
    (work / "receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")
    run.tags({"released": "yes"})
    run.artifact(work / "receipt.json")
    run.artifact(release / "README.md")

    out = params.out("publish", student)
    finish(work, out)
    say(f"publish: {student} is released in {out / 'release'}")
