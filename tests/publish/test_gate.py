"""The gate's rules: by which figure each judges, and what is refused when it is read."""

import math
import shutil

import pytest
from pydantic import ValidationError

from koala.errors import KoalaError
from koala.publish.gate import Requirement, judge

METRICS = {
    "teacher": {"good": 0.99, "unet_parameters": 1000, "step_ms": 20.0},
    "after": {"good": 0.95, "bad": 0.04, "unet_parameters": 310, "step_ms": 9.0},
    "size_of_teacher": 0.31,
    "speed_up": 2,
    "share_of_teacher/good": 0.96,
    "bounds": {"good": [0.92, 0.97], "bad": [0.03, 0.06], "share_of_teacher/good": [0.94, 0.98]},
}


@pytest.mark.parametrize(
    ("rule", "passed", "words"),
    [
        # Above the lower bound, below the value: the bound decides.
        ({"metric": "good", "at_least": 0.93}, False, "good at least 0.93: 0.950, lower bound 0.920"),
        ({"metric": "good", "at_least": 0.92}, True, "good at least 0.92: 0.950, lower bound 0.920"),
        (
            {"metric": "good", "of": "teacher", "at_least": 0.95},
            False,
            "good of teacher at least 0.95: 0.960, lower bound 0.940",
        ),
        (
            {"metric": "good", "of": "teacher", "at_least": 0.94},
            True,
            "good of teacher at least 0.94: 0.960, lower bound 0.940",
        ),
        ({"metric": "bad", "at_most": 0.05}, False, "bad at most 0.05: 0.040, upper bound 0.060"),
        ({"metric": "bad", "at_most": 0.06}, True, "bad at most 0.06: 0.040, upper bound 0.060"),
        ({"metric": "speed_up", "at_least": 2}, True, "speed_up at least 2: 2.000"),
        ({"metric": "speed_up", "at_least": 2.01}, False, "speed_up at least 2.01: 2.000"),
        ({"metric": "unet_parameters", "at_most": 310}, True, "unet_parameters at most 310: 310.000"),
        ({"metric": "unet_parameters", "at_most": 309}, False, "unet_parameters at most 309: 310.000"),
    ],
)
def test_a_score_is_judged_by_its_bound_and_a_cost_by_its_value(rule, passed, words) -> None:
    (verdict,) = judge(METRICS, [Requirement(**rule)])
    assert verdict.passed is passed
    assert str(verdict) == words
    assert verdict.report()["passed"] is passed


def test_what_is_no_number_passes_no_rule() -> None:
    metrics = {**METRICS, "bounds": {"good": [math.nan, math.nan]}, "speed_up": math.nan}
    rules = [
        Requirement(metric="good", at_least=0),
        Requirement(metric="good", at_most=1),
        Requirement(metric="speed_up", at_least=0),
    ]
    assert [verdict.passed for verdict in judge(metrics, rules)] == [False] * 3


def test_what_was_not_measured_is_named_with_what_was() -> None:
    with pytest.raises(KoalaError, match="'better', which was not measured: choose from good, bad, unet_parameters"):
        judge(METRICS, [Requirement(metric="better", at_least=0)])


@pytest.mark.parametrize(
    "rule",
    [
        Requirement(metric="attributes/all", of="teacher", at_least=0.97),
        Requirement(metric="unet_parameters", at_most=1_200_000_000),
        Requirement(metric="step_ms", at_most=0.00001),
    ],
    ids=str,
)
def test_a_rule_can_name_a_tag(rule, tmp_path, empty_store) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("gate")).info.run_id
    client.set_tag(run, f"gate/{rule}", "passed")
    client.log_metric(run, f"gate/{rule.figure}", 1)
    assert client.get_run(run).data.tags[f"gate/{rule}"] == "passed"


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ({"metric": "good"}, "the rule for good wants either at_least or at_most"),
        ({"metric": "good", "at_least": 0, "at_most": 1}, "the rule for good wants either at_least or at_most"),
        ({"metric": "speed_up", "of": "teacher", "at_least": 1}, "speed_up has no share of the teacher"),
        ({"metric": "good", "of": "student", "at_least": 1}, "teacher"),
        ({"metric": "good", "least": 1}, "least"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule, line) -> None:
    with pytest.raises(ValidationError, match=line):
        Requirement(**rule)
