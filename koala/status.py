"""One screen of where things stand: what runs and what waits, the releases that stand, the data, what would be computed.

Each part has a time limit, and one that fails is a line: a server that is down hides nothing else.
"""

import base64
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.request import Request, urlopen

from koala import params as parameters
from koala.console import show, text_table
from koala.data.tables import TableSource
from koala.errors import line_of
from koala.params import Params

SECONDS = 20.0
"""Time limit of all parts, which are asked at the same time."""
PREFECT = "PREFECT_API_URL"
"""Environment variable with the address of Prefect's API."""
_HERE = "http://127.0.0.1:4200/api"
_RUNS = ["RUNNING", "CANCELLING"]
_WAITS = ["SCHEDULED", "PENDING", "PAUSED"]


def status(as_json: bool, seconds: float = SECONDS) -> None:
    """Print where things stand, as text or as JSON. Raises KoalaError where params.yaml cannot be read."""
    loaded = parameters.load()
    parts: dict[str, Callable[[], Any]] = {
        "flow runs": lambda: flow_runs(seconds),
        "champions": lambda: champions(loaded),
        "data": lambda: data(loaded),
        "to compute": lambda: to_compute(0.9 * seconds),  # its process ends before this one does
    }
    found = within(seconds, parts)
    where = {"profile": loaded.profile, "machine": loaded.machine}
    show(json.dumps({**where, **found}, indent=2) if as_json else _screen(where, found))


def within(seconds: float, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Call all parts at the same time. Return what each gave, or `{"error": LINE}` where it failed or took too long."""
    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def call(name: str, part: Callable[[], Any]) -> None:
        try:
            answers.put((name, part()))
        except Exception as error:  # of a server, a target, a library: a line, whatever it is
            answers.put((name, {"error": line_of(error)}))

    for name, part in parts.items():
        threading.Thread(
            target=call, args=(name, part), daemon=True
        ).start()  # one that hangs does not keep the process
    found: dict[str, Any] = {name: {"error": f"no answer in {seconds:g} s"} for name in parts}
    deadline = datetime.now(UTC).timestamp() + seconds
    for _ in parts:
        try:
            name, answer = answers.get(timeout=max(0.0, deadline - datetime.now(UTC).timestamp()))
        except queue.Empty:
            break
        found[name] = answer
    return found


def flow_runs(seconds: float) -> list[dict[str, str]]:
    """Return Prefect's unfinished flow runs, those that run first: name, state, pool, host and since when."""
    wanted = {"flow_runs": {"state": {"type": {"any_": [*_RUNS, *_WAITS]}}}, "limit": 50, "sort": "START_TIME_DESC"}
    address = os.environ.get(PREFECT, _HERE).rstrip("/")
    request = Request(f"{address}/flow_runs/filter", json.dumps(wanted).encode(), {"Content-Type": "application/json"})
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urlopen(request, timeout=seconds) as answer:
            runs = json.load(answer)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(
            f"Prefect at {address}: {reason} (`make serve` starts one; {PREFECT} names another)"
        ) from None
    rows = [
        {
            "name": str(run["name"]),
            "state": str(run["state_name"]),
            "pool": str(run.get("work_pool_name") or "-"),
            "host": str(run.get("labels", {}).get("process.host", "-")),
            "since": str(run.get("start_time") or run.get("expected_start_time") or "-")[:16].replace("T", " "),
        }
        for run in sorted(runs, key=lambda run: run["state_type"] not in _RUNS)
    ]
    return rows


def champions(loaded: Params) -> dict[str, str]:
    """Return the release of each student that stands at the first target that keeps versions."""
    found = {}
    for student in loaded.students:
        shelves = ((target.kind, target.shelf(student)) for target in loaded.recipe.publish.targets)
        kind, shelf = next(((kind, shelf) for kind, shelf in shelves if shelf), (None, None))
        latest = shelf.latest() if shelf else None
        found[student] = f"{latest} (target {kind})" if latest else "none"
    return found


def data(loaded: Params) -> dict[str, Any]:
    """Return where the profile's data comes from, and at which pin."""
    source = loaded.source
    made = {"kind": source.kind, "location": source.location}
    if not isinstance(source, TableSource):
        return {**made, "rows": source.rows, "pin": "made by the project: none needed"}
    if source.pin is None:
        return {**made, "rows": source.rows, "pin": "none: `koala data update` pins it"}
    content = f"commit {source.pin.commit}" if source.pin.commit else f"{len(source.pin.files)} files"
    return {**made, "rows": source.pin.rows, "pin": f"{content} (pin {source.pin.digest})"}


def to_compute(seconds: float) -> list[str]:
    """Return the stages that `dvc repro` would run or restore, because they or what they read changed."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"dvc status: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def _screen(where: Mapping[str, str], found: Mapping[str, Any]) -> str:
    runs, champion, source, stages = found["flow runs"], found["champions"], found["data"], found["to compute"]
    parts: dict[str, Callable[[], str]] = {
        "Runs and what waits": lambda: _table(runs),
        "Champions": lambda: "\n".join(f"{student}  {version}" for student, version in champion.items()),
        "Data": lambda: "\n".join(f"{name}: {value}" for name, value in source.items() if value is not None),
        "dvc repro would compute": lambda: "\n".join(stages) or "nothing: all is up to date",
    }
    lines = [f"profile {where['profile']}, machine {where['machine']}"]
    for (title, text), answer in zip(parts.items(), (runs, champion, source, stages), strict=True):
        failed = isinstance(answer, dict) and set(answer) == {"error"}
        body = f"not known: {answer['error']}" if failed else text()
        lines += ["", title, *(f"  {line}" for line in body.splitlines())]
    return "\n".join(lines)


def _table(rows: list[dict[str, str]]) -> str:
    return (
        text_table(list(rows[0]), [list(row.values()) for row in rows]).rstrip()
        if rows
        else "nothing runs, nothing waits"
    )
