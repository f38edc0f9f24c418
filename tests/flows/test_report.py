"""Names under which a flow leaves what people see."""

import pwd
import sys

import pytest
from prefect.client.schemas.actions import ArtifactCreate

from flows import promote
from flows.report import artifact_key
from flows.services import ServiceError


@pytest.mark.parametrize("student", ["koala-700m", "koala_700m", "Koala.700M", "700m--x"])
def test_prefect_takes_the_artifacts_of_any_student(student: str) -> None:
    """A key that it refuses would fail a flow after all of its stages."""
    assert ArtifactCreate(key=artifact_key(student, "summary")).key
    assert artifact_key("koala-700m", "summary") == "koala-700m-summary"


def test_an_account_without_a_name_says_who_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container may run as a user that has no entry."""
    asked = []

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    def no_server() -> None:
        asked.append(True)
        raise ServiceError("there is no server")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(promote, "require_server", no_server)
    monkeypatch.setattr(sys, "argv", ["promote", "koala-700m", "--yes"])
    assert promote.main() == 2
    assert "this account has no name: give yours, `--by NAME`" in capsys.readouterr().err
    assert not asked
    monkeypatch.setattr(sys, "argv", ["promote", "koala-700m", "--yes", "--by", "ada"])
    assert promote.main() == 2
    assert asked
