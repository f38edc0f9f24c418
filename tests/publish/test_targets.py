"""Targets: versions that never change, publishers that meet, and uploads that break, on a real file system and S3 server."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from pydantic import ValidationError
from seaweed import KEY, SECRET, seaweed

from koala.errors import KoalaError
from koala.publish.targets import folder as folder_module
from koala.publish.targets import s3 as module
from koala.publish.targets.folder import FolderTarget
from koala.publish.targets.s3 import S3Target
from koala.publish.versions import RECEIPT, Manifest

PART = 5 * 2**20  # the least that S3 takes
LARGE = bytes(range(256)) * (2 * PART // 256) + b"the end"  # three parts


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(LARGE)
    (folder / "README.md").write_text("a card")
    (folder / RECEIPT).write_text("{}")
    (folder / "state").mkdir()
    (folder / "state" / "unfinished").touch()
    return folder


SENT = {"README.md", "unet/weights.safetensors", "manifest.json"}


class Proxy(ThreadingHTTPServer):
    """Stands before the S3 server and does to a request what `fault` says: 'drop', 'spoil', a status, or None to pass it on."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.behind = behind
        self.fault: Callable[[str, str], str | int | None] = lambda method, path: None
        self.seen: list[str] = []


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{self.command} {self.path}")
        fault = self.server.fault(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "spoil":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if isinstance(fault, int):
            self._answer(fault, {}, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
            return
        behind = http.client.HTTPConnection(*self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read())
        behind.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _do  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """An S3 server that verifies signatures."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(params=["moto", "seaweedfs"])
def proxy(
    request: pytest.FixtureRequest, s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """A proxy before an S3 server with an empty bucket `models`."""
    proxy = Proxy(s3_server if request.param == "moto" else request.getfixturevalue("on_disk"))
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(module, "PART_BYTES", PART)
    boto3.client("s3").create_bucket(Bucket="models")
    yield proxy
    proxy.fault = lambda method, path: None
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    _remove("models")
    proxy.shutdown()
    thread.join()
    proxy.server_close()


def _remove(bucket: str) -> None:
    for upload in boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        boto3.client("s3").abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    everything = boto3.resource("s3").Bucket(bucket)
    everything.objects.delete()
    everything.delete()


@pytest.fixture
def bucket(proxy: Proxy) -> S3Target:
    return S3Target(location="s3://models/releases/")


def keys() -> set[str]:
    return {entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket="models").get("Contents", ())}


def read(key: str) -> bytes:
    return boto3.client("s3").get_object(Bucket="models", Key=f"releases/koala/{key}")["Body"].read()


def unfinished() -> list[str]:
    return [each["Key"] for each in boto3.client("s3").list_multipart_uploads(Bucket="models").get("Uploads", ())]


def test_a_folder_holds_versions_and_names_the_latest(release: Path, tmp_path: Path) -> None:
    target = FolderTarget(path=tmp_path / "shared")
    place = tmp_path / "shared" / "koala"
    for _ in range(2):  # the same release is the same version
        assert target.send(release, "koala") == {"version": "v1", "path": str(place / "v1")}
    assert {path.relative_to(place / "v1").as_posix() for path in (place / "v1").rglob("*") if path.is_file()} == SENT
    before = (place / "v1" / "manifest.json").read_bytes()

    (release / "README.md").write_text("another card")
    assert target.send(release, "koala")["version"] == "v2"
    assert (place / "v1" / "README.md").read_text() == "a card"
    assert (place / "v1" / "manifest.json").read_bytes() == before
    assert json.loads((place / "latest.json").read_text()) == {
        "version": "v2",
        "manifest_sha256": Manifest.of(place / "v2").sha256,
    }

    (release / "README.md").write_text("a card")
    assert target.send(release, "koala")["version"] == "v1"
    assert json.loads((place / "latest.json").read_text())["version"] == "v1"
    assert {path.name for path in place.iterdir()} == {"v1", "v2", "latest.json", ".lock"}


def test_what_a_killed_publisher_left_in_a_folder_is_not_released(release: Path, tmp_path: Path) -> None:
    left = tmp_path / "shared" / "koala" / ".partial"
    left.mkdir(parents=True)
    (left / "half.safetensors").touch()
    assert FolderTarget(path=tmp_path / "shared").send(release, "koala")["version"] == "v1"
    assert not left.exists()
    assert not (left.with_name("v1") / "half.safetensors").exists()


def test_a_damaged_version_in_a_folder_is_mended_by_publishing_again(release: Path, tmp_path: Path) -> None:
    """`koala release verify` says so."""
    target = FolderTarget(path=tmp_path / "shared")
    target.send(release, "koala")
    place = tmp_path / "shared" / "koala" / "v1"
    before = (place / "manifest.json").read_bytes()
    (place / "README.md").write_text("b card")  # of the same size
    (place / "unet" / "weights.safetensors").unlink()
    assert target.shelf("koala").damaged("v1") == ["README.md", "unet/weights.safetensors"]
    assert target.send(release, "koala")["version"] == "v1"
    assert target.shelf("koala").damaged("v1") == []
    assert (place / "manifest.json").read_bytes() == before
    assert {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()} == SENT


def test_a_rollback_and_a_publisher_that_meet_in_a_folder_both_end(release: Path, tmp_path: Path) -> None:
    shelf = FolderTarget(path=tmp_path / "shared").shelf("koala")
    for card in ("one", "another"):
        (release / "README.md").write_text(card)
        FolderTarget(path=tmp_path / "shared").send(release, "koala")
    failed: list[Exception] = []

    def point(version: str) -> None:
        for _ in range(300):
            try:
                shelf.point_to(version)
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=point, args=(version,)) for version in ("v1", "v2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert shelf.latest() in ("v1", "v2")
    assert {path.name for path in shelf.place.iterdir()} == {"v1", "v2", "latest.json", ".lock"}


def test_publishers_that_meet_in_a_folder_take_versions_of_their_own(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_now = folder_module._copy
    # Slow, so that they do meet.
    monkeypatch.setattr(folder_module, "_copy", lambda *asked: (time.sleep(0.05), copy_now(*asked)))
    releases = []
    for number in range(4):
        copy = tmp_path / f"release-{number}"
        copy.mkdir()
        (copy / "README.md").write_text(str(number))
        releases.append(copy)
    found: list[str] = []
    target = FolderTarget(path=tmp_path / "shared")
    threads = [
        threading.Thread(target=lambda one=one: found.append(target.send(one, "koala")["version"])) for one in releases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["v1", "v2", "v3", "v4"]


def test_a_link_in_a_release_is_refused(release: Path, tmp_path: Path) -> None:
    (release / "secret").symlink_to("/etc/hostname")
    with pytest.raises(KoalaError, match="secret is a link: put the file itself"):
        FolderTarget(path=tmp_path / "shared").send(release, "koala")
    (release / "secret").unlink()
    (release / "vae").symlink_to(release / "unet")  # of a folder too, which would be left out
    with pytest.raises(KoalaError, match="vae is a link: put the file itself"):
        FolderTarget(path=tmp_path / "shared").send(release, "koala")


def test_s3_holds_versions_and_names_the_latest(release: Path, bucket: S3Target, proxy: Proxy) -> None:
    assert bucket.send(release, "koala") == {"version": "v1", "location": "s3://models/releases/koala/v1"}
    assert keys() == {f"releases/koala/v1/{name}" for name in SENT} | {"releases/koala/latest.json"}
    assert read("v1/unet/weights.safetensors") == LARGE
    assert json.loads(read("latest.json"))["version"] == "v1"
    assert unfinished() == []

    proxy.seen.clear()
    assert bucket.send(release, "koala")["version"] == "v1"  # the same again: nothing is written
    assert not [request for request in proxy.seen if request.startswith(("PUT", "POST", "DELETE"))]

    (release / "README.md").write_text("another card")
    assert bucket.send(release, "koala")["version"] == "v2"
    assert json.loads(read("latest.json"))["version"] == "v2"
    assert read("v1/README.md") == b"a card"

    shelf = bucket.shelf("koala")
    assert (shelf.versions(), shelf.latest()) == (["v1", "v2"], "v2")
    shelf.point_to("v1")
    assert json.loads(read("latest.json"))["version"] == "v1"
    assert shelf.damaged("v1") == []
    boto3.client("s3").put_object(Bucket="models", Key="releases/koala/v1/unet/weights.safetensors", Body=b"x")
    boto3.client("s3").delete_object(Bucket="models", Key="releases/koala/v1/README.md")
    assert shelf.damaged("v1") == ["README.md", "unet/weights.safetensors"]
    with pytest.raises(KoalaError, match="has no version 'v7': choose one of v1, v2"):
        shelf.point_to("v7")


@pytest.mark.parametrize("fault", ["drop", 503])
def test_a_broken_upload_leaves_no_release_and_resumes(
    release: Path, bucket: S3Target, proxy: Proxy, fault: str | int
) -> None:
    proxy.fault = lambda method, path: fault if "partNumber=3" in path else None
    with pytest.raises(KoalaError, match="run it again, it resumes") as caught:
        bucket.send(release, "koala")
    assert "a-secret" not in str(caught.value)
    assert "releases/koala/latest.json" not in keys()
    assert unfinished() == ["releases/koala/v1/unet/weights.safetensors"]

    proxy.fault = lambda method, path: None
    proxy.seen.clear()
    assert bucket.send(release, "koala")["version"] == "v1"
    parts = [request for request in proxy.seen if "partNumber=" in request]
    assert len(parts) == 1
    assert "partNumber=3" in parts[0]
    assert read("v1/unet/weights.safetensors") == LARGE
    assert unfinished() == []


def test_a_part_that_was_spoilt_on_the_way_is_not_released(release: Path, bucket: S3Target, proxy: Proxy) -> None:
    proxy.fault = lambda method, path: "spoil" if "partNumber=2" in path else None
    with pytest.raises(KoalaError, match=r"arrived with another checksum: publish again"):
        bucket.send(release, "koala")
    assert not {"releases/koala/latest.json", "releases/koala/v1/unet/weights.safetensors"} & keys()
    proxy.fault = lambda method, path: None
    bucket.send(release, "koala")
    assert read("v1/unet/weights.safetensors") == LARGE


def test_what_the_broken_upload_sent_of_other_bytes_is_sent_again(
    release: Path, bucket: S3Target, proxy: Proxy
) -> None:
    bucket.send(release, "koala")
    other = b"x" * len(LARGE)
    boto3.client("s3").put_object(Bucket="models", Key="releases/koala/v1/unet/weights.safetensors", Body=other)
    assert bucket.send(release, "koala")["version"] == "v1"
    assert read("v1/unet/weights.safetensors") == LARGE


def test_of_two_publishers_one_moves_latest_and_the_other_is_told(
    release: Path, bucket: S3Target, proxy: Proxy, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("of another publisher")
    for had in (None, "v2"):  # the first release of all, and a later one
        (release / "README.md").write_text(f"after {had}")
        (other / "README.md").write_text(f"another's after {had}")

        def meet(method: str, path: str) -> None:
            if method == "PUT" and path.endswith("latest.json"):
                proxy.fault = lambda method, path: None
                bucket.send(other, "koala")

        proxy.fault = meet
        with pytest.raises(KoalaError, match=r"another publisher moved s3://models/releases/koala/latest.json to v\d"):
            bucket.send(release, "koala")
        latest = json.loads(read("latest.json"))
        assert read(f"{latest['version']}/README.md").decode() == f"another's after {had}"


def test_a_version_is_claimed_once(release: Path, bucket: S3Target, proxy: Proxy, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("of another publisher")

    def meet(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("v1/manifest.json"):
            proxy.fault = lambda method, path: None
            S3Target(location=bucket.location).send(other, "koala")

    proxy.fault = meet
    with pytest.raises(KoalaError, match="while v2 was sent, which is whole and stays"):
        bucket.send(release, "koala")
    assert read("v1/README.md") == b"of another publisher"
    assert read("v2/README.md") == b"a card"


def test_what_cannot_be_is_one_line(release: Path, bucket: S3Target, forget_credentials: Callable[[], None]) -> None:
    with pytest.raises(KoalaError, match=r"no such bucket: create it, or put publish.targets.s3.location right"):
        S3Target(location="s3://nobodys/x").send(release, "koala")
    boto3.client("s3").put_object(Bucket="models", Key="releases/koala/latest.json", Body=b"[]")
    with pytest.raises(KoalaError, match=r"koala/latest.json does not name a version"):
        bucket.send(release, "koala")
    for location in ("models/x", "https://models/x", "s3://"):
        with pytest.raises(ValidationError, match="write it as s3://bucket/prefix"):
            S3Target(location=location)
    forget_credentials()
    with pytest.raises(KoalaError, match="no credentials for s3://models/releases: set AWS_ACCESS_KEY_ID"):
        bucket.send(release, "koala")


def test_a_wrong_key_is_one_line_without_the_key(
    release: Path, on_disk: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*on_disk))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for key, secret, line in (
        (KEY, "another-secret", "the secret key is wrong: check AWS_SECRET_ACCESS_KEY"),
        ("nobody", SECRET, "the access key is not known there: check AWS_ACCESS_KEY_ID"),
    ):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        with pytest.raises(KoalaError, match=line) as caught:
            S3Target(location="s3://models/releases").send(release, "koala")
        assert secret not in str(caught.value)


def test_a_version_that_does_not_stand_moves_no_pointer(release: Path, bucket: S3Target, tmp_path: Path) -> None:
    for target in (bucket, FolderTarget(path=tmp_path / "shared")):
        shelf = target.shelf("candidates")
        assert target.send(release, "candidates", stands=False)["version"] == "v1"
        assert (shelf.versions(), shelf.latest()) == (["v1"], None)
        target.send(release, "candidates")
        (release / "README.md").write_text(f"a candidate at {target.kind}")
        assert target.send(release, "candidates", stands=False)["version"] == "v2"
        assert (shelf.versions(), shelf.latest(), shelf.damaged("v2")) == (["v1", "v2"], "v1", [])
        shelf.point_to("v2")
        assert shelf.latest() == "v2"
