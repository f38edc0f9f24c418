"""A version at the targets, judged before it becomes the one that stands: by today's rules, beside today's champion."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koala.console import say, text_table
from koala.errors import KoalaError
from koala.evaluate.values import FILE as VALUES
from koala.evaluate.values import SAMPLES
from koala.publish.champion import Champion, verdicts_on
from koala.publish.config import PublishConfig
from koala.publish.gate import Verdict

EVALUATION = ("metrics.json", VALUES)
VERDICT, TABLE, GRID = "verdict.json", "verdicts.md", "beside.png"


def judge_version(config: PublishConfig, student: str, version: str, out: Path) -> dict[str, Any]:
    """Judge a version of a student as the gate would, and lay its images beside the champion's.

    Args:
        config: The gate and the targets.
        student: The student's name.
        version: A version at the first target that keeps versions.
        out: Receives verdict.json (what is returned), verdicts.md (a table) and, where both have images, beside.png.

    Returns:
        `version`, `stands` (the champion's version, or None), `passed`, `automatic` (it may stand without a person's yes) and
        `rules`, all verdicts in words.

    Raises:
        KoalaError: There is no such version, or it holds no evaluation.
    """
    shelf = next((shelf for target in config.targets if (shelf := target.shelf(student))), None)
    if shelf is None:
        raise KoalaError("no target keeps versions: name one under publish.targets, such as {folder: {path: releases}}")
    evaluation = out / "evaluation"
    shutil.rmtree(evaluation, ignore_errors=True)  # of another version
    (out / GRID).unlink(missing_ok=True)
    (evaluation / SAMPLES).mkdir(parents=True, exist_ok=True)
    samples = [name for name in shelf.manifest(version).files if name.startswith(f"{SAMPLES}/")]
    for name in (*EVALUATION, *samples):
        content = shelf.read(version, name)
        if content is None:
            raise KoalaError(
                f"{student} {version} holds no {name}: it was released before evaluations travelled with it"
            )
        (evaluation / name).parent.mkdir(exist_ok=True)
        (evaluation / name).write_bytes(content)
    latest = shelf.latest()
    champion = Champion(f"{student} {latest}", latest, shelf) if latest and latest != version else None
    verdicts = verdicts_on(evaluation, config, champion)
    if champion and (images := champion.beside(evaluation, f"{student} {version}")):
        images.save(out / GRID)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    then = json.loads(champion.shelf.read(champion.version, "metrics.json") or b"{}") if champion else {}
    (out / TABLE).write_text(_table(version, latest, verdicts, metrics.get("after", {}), then.get("after", {})))
    passed = all(each.passed for each in verdicts)
    verdict = {
        "version": version,
        "stands": latest,
        "passed": passed,
        "automatic": passed and config.promote == "automatic",
        "rules": [f"{'passed' if each.passed else 'failed'}: {each}" for each in verdicts],
    }
    (out / VERDICT).write_text(json.dumps(verdict, indent=2) + "\n")
    return verdict


def _table(
    version: str, latest: str | None, verdicts: Sequence[Verdict], ours: dict[str, Any], theirs: dict[str, Any]
) -> str:
    """Return the rules with their verdicts, and the figures of both, as Markdown."""
    rules = [f"| {each.rule} | {each} | {'passed' if each.passed else '**failed**'} |" for each in verdicts]
    numbers = [name for name, value in ours.items() if isinstance(value, int | float)]
    figures = [f"| {name} | {theirs.get(name, '-')} | {ours[name]} |" for name in numbers]
    return "\n".join(
        [
            *("| rule | judged | verdict |", "|---|---|---|", *rules, ""),
            *(f"| figure | {latest or 'none'} (stands) | {version} |", "|---|---|---|", *figures, ""),
        ]
    )


def approve_version(student: str, version: str, because: str, by: str | None) -> None:
    """Answer yes to the flow `promote` that waits with a version. by: left out, the name of the account.

    Raises:
        KoalaError: None waits, or Prefect does not answer.
    """
    # A process of its own, since Prefect is imported by flows alone.
    command = [sys.executable, "-m", "flows.promote", student, f"--version={version}", "--yes", f"--because={because}"]
    command += [f"--by={by}"] if by else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    if done.returncode:
        raise KoalaError(lines[-1].removeprefix("promote: ") if lines else f"{command[2]} ended with {done.returncode}")
    for line in lines:
        say(line)


def show_verdict(verdict: dict[str, Any]) -> str:
    """Return the verdict as a table for a terminal."""
    rows = [each.split(": ", 1) for each in verdict["rules"]]
    return text_table(["verdict", "rule"], rows).rstrip()
