"""The Hub as a target, over HTTP, against a server that speaks its API, with its faults."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
from hub_server import TOKEN, Handler, Hub, answers

from koala.errors import KoalaError
from koala.publish.releases import roll_back, show_releases, verify
from koala.publish.targets import hub as module
from koala.publish.targets.hub import HubTarget
from koala.publish.versions import Manifest

NAME = "koala-700m"
TARGET = HubTarget(owner="owner")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = hub_server.serve()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release of a card, a configuration and large weights."""
    folder = tmp_path / "release"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe first.\n")
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 300)
    (folder / "receipt.json").write_text('{"secret": "stays here"}')
    return folder


def second(release: Path) -> Path:
    """The release with other weights, one file more and one less."""
    other = Path(shutil.copytree(release, release.with_name("second")))
    (other / "README.md").write_text("---\nlicense: mit\n---\nThe second.\n")
    (other / "unet" / "weights.safetensors").write_bytes(bytes(range(255, -1, -1)) * 300)
    (other / "unet" / "config.json").unlink()
    (other / "report.html").write_text("<p>")
    return other


def uploads(hub: Hub) -> int:
    return sum(line.startswith("PUT /lfs/") for line in hub.asked)


def on_main(hub: Hub) -> dict[str, bytes]:
    return {name: content for name, content in (hub.tree("main") or {}).items() if name != ".gitattributes"}


def test_a_release_is_proposed_compared_merged_and_tagged(hub: Hub, release: Path) -> None:
    sent = TARGET.send(release, NAME)
    assert sent == {"version": "v1", "repository": "owner/koala-700m", "commit": hub.tags["v1"]}
    assert hub.pulls == [{"title": hub.pulls[0]["title"], "status": "merged"}]
    assert hub.pulls[0]["title"].startswith(f"Release {Manifest.of(release).sha256[:16]} on ")
    assert hub.tags["v1"] == hub.refs["main"]
    assert set(on_main(hub)) == {"README.md", "manifest.json", "unet/config.json", "unet/weights.safetensors"}
    assert on_main(hub)["unet/weights.safetensors"] == (release / "unet" / "weights.safetensors").read_bytes()
    read = [line for line in hub.asked if "resolve/refs/pr/1/" in line]
    assert any("unet/weights.safetensors" in line for line in read), "it was not read back"
    assert max(hub.asked.index(line) for line in read) < next(
        number for number, line in enumerate(hub.asked) if line.endswith("/merge")
    )


def test_the_same_release_twice_is_one_version(hub: Hub, release: Path) -> None:
    first = TARGET.send(release, NAME)
    (release / "receipt.json").write_text("{}")  # is not sent
    assert TARGET.send(release, NAME) == first
    assert (len(hub.pulls), uploads(hub), list(hub.tags)) == (1, 1, ["v1"])


def test_versions_are_listed_verified_and_rolled_back(hub: Hub, release: Path, capsys: pytest.CaptureFixture) -> None:
    for each in (release, second(release)):
        TARGET.send(each, NAME)
    assert set(on_main(hub)) == {"README.md", "manifest.json", "report.html", "unet/weights.safetensors"}
    shelf = TARGET.shelf(NAME)
    assert (shelf.versions(), shelf.latest()) == (["v1", "v2"], "v2")
    assert shelf.manifest("v1") == Manifest.of(release)
    assert shelf.read("v2", "report.html") == b"<p>"
    assert shelf.read("v1", "report.html") is None
    assert shelf.missing("v1") == []
    show_releases([TARGET], [NAME])
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[2:]] == ["v1", "v2"]
    verify([TARGET], NAME, "v1")

    commits, sent = len(hub.commits), uploads(hub)
    roll_back([TARGET], NAME, "v1")
    assert on_main(hub) == {name: content for name, content in hub.tree("v1").items() if name != ".gitattributes"}
    assert (shelf.versions(), shelf.latest()) == (["v1", "v2"], "v1")
    assert (len(hub.commits), uploads(hub)) == (commits + 1, sent), "a commit more, and no file is sent again"
    assert hub.tree("v2")["report.html"] == b"<p>"
    # The second, published again: no third version, and main holds it.
    assert TARGET.send(release.with_name("second"), NAME)["version"] == "v2"
    assert shelf.latest() == "v2"
    assert list(hub.tags) == ["v1", "v2"]


def test_a_tag_of_someone_elses_is_listed_as_such(hub: Hub, release: Path, capsys: pytest.CaptureFixture) -> None:
    target = HubTarget(owner="owner")
    target.shelf("name").create(True)
    hub.tags["v1"] = hub.refs["main"]
    assert target.send(release, "name")["version"] == "v2"
    show_releases([target], ["name"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[-2:]] == [["name", "hub", "v1"], ["name", "hub", "v2"]]
    assert " ".join(lines[-2][3:]) == "no manifest that koala can read"
    assert lines[-1][-1] == "latest"


def test_damage_is_found(hub: Hub, release: Path) -> None:
    TARGET.send(release, NAME)
    hub.commits[hub.tags["v1"]]["unet/config.json"] = b"spoilt"
    with pytest.raises(KoalaError, match=r"v1 lacks unet/config.json as its manifest has it"):
        verify([TARGET], NAME, None)
    with pytest.raises(KoalaError, match=r"owner/koala-700m has no version 'v7': choose one of v1"):
        verify([TARGET], NAME, "v7")


def test_a_broken_upload_goes_on(hub: Hub, release: Path) -> None:
    """The commit fails for good after the weights arrived: the next call sends no weights."""
    hub.fault("POST .*/commit/", answers(500), times=4)
    with pytest.raises(KoalaError, match=r"cannot use owner/koala-700m .*: it answers 500: publish again, it resumes"):
        TARGET.send(release, NAME)
    assert (uploads(hub), hub.pulls, hub.tags) == (1, [], {})
    assert TARGET.send(release, NAME)["version"] == "v1"
    assert uploads(hub) == 1


def test_a_publisher_that_ends_before_the_merge_or_the_tag_is_continued(hub: Hub, release: Path) -> None:
    for step in ("/merge", "/tag/"):
        hub.fault(step, answers(500), times=4)
        with pytest.raises(KoalaError, match="it answers 500"):
            TARGET.send(release, NAME)
    assert [pull["status"] for pull in hub.pulls] == ["merged"]
    assert TARGET.send(release, NAME)["version"] == "v1"
    assert len(hub.pulls) == 1
    assert hub.tags == {"v1": hub.refs["main"]}


def test_an_open_pull_request_is_listed(hub: Hub, release: Path, capsys: pytest.CaptureFixture) -> None:
    hub.fault("/merge", answers(500), times=4)
    with pytest.raises(KoalaError, match="it answers 500"):
        TARGET.send(release, NAME)
    show_releases([TARGET], [NAME])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        [NAME, "hub", "pull", "request", "1", "not", "merged"]
    ]


def test_what_arrives_with_other_bytes_is_not_merged(hub: Hub, release: Path) -> None:
    def spoil(handler: Handler) -> bool:
        handler.server.large[handler.path.rpartition("/")[2]] = handler.body()[:-1] + b"!"
        handler.reply({})
        return True

    hub.fault("PUT /lfs/", spoil)
    with pytest.raises(
        KoalaError, match=r"holds other bytes of unet/weights.safetensors than were sent: .* 1 is closed"
    ):
        TARGET.send(release, NAME)
    assert [pull["status"] for pull in hub.pulls] == ["closed"]
    assert on_main(hub) == {}
    assert hub.tags == {}


WHILE = ["POST .*/commit/", "GET .*/resolve/refs/pr/{}/README.md"]  # it is sent, and it is read back


def edit(handler: Handler) -> bool:
    """Let someone edit the card in `main`."""
    tree = handler.server.tree("main") or {}
    handler.server.commit(tree | {"README.md": b"of another", "notes.md": str(len(tree)).encode()}, "main")
    return False


@pytest.mark.parametrize("at", WHILE)
def test_on_a_head_that_moved_a_release_is_proposed_anew(hub: Hub, release: Path, at: str) -> None:
    TARGET.send(release, NAME)
    hub.fault(at.format(2), edit)
    sent = TARGET.send(second(release), NAME)
    assert (sent["version"], sent["commit"]) == ("v2", hub.refs["main"])
    assert set(on_main(hub)) == {"README.md", "manifest.json", "report.html", "unet/weights.safetensors"}
    assert b"The second" in on_main(hub)["README.md"]
    assert uploads(hub) == 2, "no weights are sent twice"
    assert [pull["status"] for pull in hub.pulls][-1] == "merged"
    assert "open" not in [pull["status"] for pull in hub.pulls]
    assert b"of another" in [tree.get("README.md") for tree in hub.commits.values()], "it is in the history"


@pytest.mark.parametrize("at", WHILE)
def test_a_head_that_does_not_rest_is_given_up(hub: Hub, release: Path, at: str) -> None:
    TARGET.shelf(NAME).create(private=True)
    for number in range(1, 9):
        hub.fault(at.format(number), edit)
    with pytest.raises(KoalaError, match=r"another publisher moved owner/koala-700m .*publish again"):
        TARGET.send(release, NAME)
    assert on_main(hub)["README.md"] == b"of another"
    assert hub.tags == {}
    assert {pull["status"] for pull in hub.pulls} <= {"closed"}


@pytest.mark.parametrize("at", WHILE)
def test_another_release_that_came_to_stand_meanwhile_is_not_overwritten(hub: Hub, release: Path, at: str) -> None:
    """The gate compared with the one before it."""
    TARGET.shelf(NAME).create(private=True)
    others = {"README.md": b"of another", "manifest.json": b"{}"}
    hub.fault(at.format(1), lambda handler: bool(handler.server.commit(others, "main")) and False)
    with pytest.raises(
        KoalaError, match=r"another publisher moved .*publish again if this release shall be the latest"
    ):
        TARGET.send(release, NAME)
    assert on_main(hub) == others
    assert hub.tags == {}
    assert TARGET.send(release, NAME)["version"] == "v1"
    assert b"The first" in on_main(hub)["README.md"]


def test_a_version_that_another_publisher_took_is_not_ours(hub: Hub, release: Path) -> None:
    TARGET.shelf(NAME).create(private=True)
    other = hub.commit({"manifest.json": b"{}"}, "refs/pr/9")
    hub.fault("POST .*/tag/", lambda handler: bool(handler.server.tags.update(v1=other)))
    sent = TARGET.send(release, NAME)
    assert (sent["version"], sent["commit"]) == ("v2", hub.refs["main"])
    assert hub.tags == {"v1": other, "v2": hub.refs["main"]}
    # Of candidates too, on a head that moved.
    hub.fault("POST .*/commit/", edit)
    hub.fault("POST .*/tag/", lambda handler: bool(handler.server.tags.update(v3=other)))
    sent = TARGET.send(second(release), NAME, stands=False)
    assert (sent["version"], sent["commit"]) == ("v4", hub.tags["v4"])
    assert b"The second" in hub.tree("v4")["README.md"]


def test_the_hub_is_asked_again_as_late_as_it_says(hub: Hub, release: Path, capsys: pytest.CaptureFixture) -> None:
    hub.fault("POST .*/commit/", answers(429, Retry_After="0"), times=2)
    hub.fault("GET .*/refs", answers(503))
    assert TARGET.send(release, NAME)["version"] == "v1"
    assert uploads(hub) == 1
    assert "the Hub answers 429: again in 0 s" in capsys.readouterr().err
    hub.fault("GET .*/refs", answers(429, Retry_After="3600"))
    with pytest.raises(KoalaError, match="too many requests: publish again later"):
        TARGET.send(release, NAME)


@pytest.mark.parametrize(
    ("status", "line"),
    [(401, "the token is not valid: check HF_TOKEN"), (403, "this token may not write there")],
)
def test_who_may_not_is_told(hub: Hub, release: Path, status: int, line: str) -> None:
    hub.fault("POST /api/repos/create", answers(status), times=9)
    with pytest.raises(KoalaError, match=line) as error:
        TARGET.send(release, NAME)
    assert TOKEN not in str(error.value)


def test_no_token_and_no_hub_are_told(hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(KoalaError, match=r"cannot reach the Hugging Face Hub for owner/koala-700m"):
        TARGET.send(release, NAME)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(KoalaError, match=r"no token for owner/koala-700m .*: set HF_TOKEN"):
        TARGET.send(release, NAME)


def test_a_repository_that_is_not_there_holds_no_versions(hub: Hub) -> None:
    assert TARGET.shelf(NAME).versions() == []
    assert TARGET.shelf(NAME).latest() is None


def test_a_rollback_does_not_undo_what_another_publisher_just_did(hub: Hub, release: Path) -> None:
    for each in (release, second(release)):
        TARGET.send(each, NAME)

    def move(handler: Handler) -> bool:
        handler.server.commit({"README.md": b"of another publisher"}, "main")
        return False

    hub.fault("POST .*/commit/", move)
    with pytest.raises(KoalaError, match="another publisher moved it meanwhile: run the same command again"):
        roll_back([TARGET], NAME, "v1")
    assert on_main(hub) == {"README.md": b"of another publisher"}


def test_a_candidate_is_a_tag_of_a_closed_pull_request_until_main_holds_it(hub: Hub, release: Path) -> None:
    TARGET.send(release, NAME)
    shelf, stood = TARGET.shelf(NAME), hub.refs["main"]
    for _ in range(2):  # sent again: the same version
        assert TARGET.send(second(release) if len(hub.tags) == 1 else release.with_name("second"), NAME, False) == {
            "version": "v2",
            "repository": "owner/koala-700m",
            "commit": hub.refs["refs/pr/2"],
        }
    assert [pull["status"] for pull in hub.pulls] == ["merged", "closed"]
    assert any("resolve/refs/pr/2/unet/weights.safetensors" in line for line in hub.asked), "it was not read back"
    assert (hub.refs["main"], shelf.latest(), shelf.candidates()) == (stood, "v1", [])
    roll_back([TARGET], NAME, "v2")
    assert shelf.latest() == "v2"
    assert on_main(hub) == {name: content for name, content in hub.tree("v2").items() if name != ".gitattributes"}


def test_the_first_release_can_be_a_candidate(hub: Hub, release: Path) -> None:
    assert TARGET.send(release, NAME, stands=False)["version"] == "v1"
    assert (on_main(hub), TARGET.shelf(NAME).latest()) == ({}, None)
    roll_back([TARGET], NAME, "v1")
    assert TARGET.shelf(NAME).latest() == "v1"
