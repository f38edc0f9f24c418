"""A bucket of S3, or of a server that speaks its protocol, as a target.

A version is claimed by its manifest, which S3 takes only where there is none (`If-None-Match`). Whoever sends the same
release again, after a broken upload too, finds the claim and sends what is missing. latest.json moves only from what was
read (`If-Match`), so that of two publishers one wins and the other is told.

Credentials, region and endpoint come from the environment alone (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator

from koala.console import progress
from koala.errors import KoalaError, line_of
from koala.publish.targets.base import Shelf, Target
from koala.publish.versions import (
    LATEST,
    MANIFEST,
    File,
    Manifest,
    after,
    latest,
    no_such_version,
    numbered,
    read_latest,
)

PART_BYTES = 64 * 2**20
"""Bytes of a part of a large file: what an interrupted upload repeats at most."""


class S3Target(Target):
    """Versions of releases under a prefix: `s3://bucket/prefix/NAME/v1/`, `v2/`, ..., and latest.json."""

    kind: Literal["s3"] = "s3"
    """Name of the kind."""

    location: str
    """Where releases go: `s3://bucket/prefix`."""

    @field_validator("location")
    @classmethod
    def _names_a_bucket(cls, location: str) -> str:
        parts = urlsplit(location)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise ValueError("write it as s3://bucket/prefix")
        return location.rstrip("/")

    def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
        """Upload the release as a new version, or find the one that holds it; if it `stands`, let latest.json name it.

        Returns its `version` and `location`. Raises KoalaError where the bucket cannot be used, and where another
        publisher moved latest.json meanwhile.
        """
        manifest = Manifest.of(release)
        with _explained(self.location):
            shelf = self.shelf(name)
            before = shelf.pointer()
            version = shelf.claim(manifest)
            shelf.fill(version, manifest, release)
            if stands:
                shelf.move_pointer(version, manifest, before)
        return {"version": version, "location": f"{self.location}/{name}/{version}"}

    def shelf(self, name: str) -> "S3Shelf":
        """Return the versions of student `name`."""
        return S3Shelf(self.location, name)


class S3Shelf(Shelf):
    """The versions of one student in a bucket."""

    def __init__(self, location: str, name: str) -> None:
        """Take the versions under `location / name`."""
        import boto3

        parts = urlsplit(location)
        self._bucket, self._location = parts.netloc, f"{location}/{name}"
        self._prefix = f"{parts.path}/{name}/".lstrip("/")
        self._s3: Any = boto3.Session().client("s3")

    def versions(self) -> list[str]:
        """Return the versions, the oldest first; one whose upload broke is among them."""
        with _explained(self._location):
            return self._versions()

    def latest(self) -> str | None:
        """Return the version that latest.json names."""
        with _explained(self._location):
            pointer = self.pointer()
        return pointer[1] if pointer else None

    def manifest(self, version: str) -> Manifest:
        """Return what a version holds."""
        with _explained(self._location):
            found = self._get(f"{version}/{MANIFEST}")
            if found is None:
                raise KoalaError(no_such_version(version, self._location, self._versions()))
        return Manifest.read(found[0], f"{self._location}/{version}/{MANIFEST}")

    def read(self, version: str, file: str) -> bytes | None:
        """Return the content of a small file of a version."""
        with _explained(self._location):
            found = self._get(f"{version}/{file}")
        return found[0] if found else None

    def sha256(self, version: str, file: str) -> str | None:
        """Read a file of a version and return its SHA-256."""
        with _explained(self._location):
            try:
                answer = self._s3.get_object(Bucket=self._bucket, Key=f"{self._prefix}{version}/{file}")
            except self._s3.exceptions.NoSuchKey:
                return None
            digest = hashlib.sha256()
            for content in answer["Body"].iter_chunks(2**20):
                digest.update(content)
        return digest.hexdigest()

    def sizes(self, version: str) -> dict[str, int]:
        """Return the bytes of each file of a version."""
        with _explained(self._location):
            return self._sizes(version)

    def point_to(self, version: str) -> None:
        """Let latest.json name a version."""
        manifest = self.manifest(version)
        with _explained(self._location):
            self.move_pointer(version, manifest, self.pointer())

    def pointer(self) -> tuple[str, str] | None:
        """Return ETag and version of latest.json; None where there is none."""
        found = self._get(LATEST)
        if found is None:
            return None
        text, etag = found
        return etag, read_latest(text, f"{self._location}/{LATEST}")

    def claim(self, manifest: Manifest) -> str:
        """Return the version that is of this manifest; the next one, where there is none."""
        while True:
            versions = self._versions()
            for version in reversed(versions):
                found = self._get(f"{version}/{MANIFEST}")
                if found and Manifest.read(found[0], f"{self._location}/{version}/{MANIFEST}") == manifest:
                    return version
            version = after(versions)
            if self._put(f"{version}/{MANIFEST}", manifest.text(), {"IfNoneMatch": "*"}):
                return version

    def fill(self, version: str, manifest: Manifest, release: Path) -> None:
        """Upload what the version lacks. S3 compares each part's SHA-256 with what it received."""
        there = self._sizes(version)
        total = sum(file.size for file in manifest.files.values())
        for name in progress(sorted(manifest.files), f"publish: {total / 1e9:.2f} GB to {self._location}/{version}"):
            file = manifest.files[name]
            key = f"{self._prefix}{version}/{name}"
            if there.get(name) != file.size or not self._is_whole(key, file, release / name):
                self._upload(key, file, release / name)

    def move_pointer(self, version: str, manifest: Manifest, before: tuple[str, str] | None) -> None:
        """Let latest.json name the version, unless it changed since `before` was read."""
        if before and before[1] == version:
            return
        condition = {"IfMatch": before[0]} if before else {"IfNoneMatch": "*"}
        if self._put(LATEST, latest(version, manifest), condition):
            return
        now = self.pointer()
        if now and now[1] == version:
            return
        raise KoalaError(
            f"another publisher moved {self._location}/{LATEST} to {now[1] if now else 'nothing'} while {version} was "
            f"sent, which is whole and stays: publish again if it shall be the latest"
        )

    def _versions(self) -> list[str]:
        prefixes = self._list("list_objects_v2", "CommonPrefixes", "", Delimiter="/")
        return numbered(entry["Prefix"].removeprefix(self._prefix).rstrip("/") for entry in prefixes)

    def _sizes(self, version: str) -> dict[str, int]:
        entries = self._list("list_objects_v2", "Contents", f"{version}/")
        return {entry["Key"].removeprefix(f"{self._prefix}{version}/"): entry["Size"] for entry in entries}

    def _list(self, operation: str, field: str, under: str, **options: str) -> list[dict[str, Any]]:
        pages = self._s3.get_paginator(operation).paginate(Bucket=self._bucket, Prefix=self._prefix + under, **options)
        return [entry for page in pages for entry in page.get(field, ())]

    def _get(self, name: str) -> tuple[bytes, str] | None:
        try:
            answer = self._s3.get_object(Bucket=self._bucket, Key=self._prefix + name)
        except self._s3.exceptions.NoSuchKey:
            return None
        return answer["Body"].read(), answer["ETag"]

    def _put(self, name: str, text: str, condition: dict[str, str]) -> bool:
        """Write a small object. Return False where the condition does not hold, or no longer."""
        from botocore.exceptions import ClientError

        body = text.encode()
        key = self._prefix + name
        try:
            self._s3.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType="application/json", **condition)
        except ClientError as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def _is_whole(self, key: str, file: File, path: Path) -> bool:
        """Return whether an object of the right size has the right checksum."""
        head = self._s3.head_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
        # S3 appends the count of parts to a composite checksum, other servers do not.
        return str(head.get("ChecksumSHA256", "")).partition("-")[0] == _checksum(file, path)

    def _upload(self, key: str, file: File, path: Path) -> None:
        if file.size <= PART_BYTES:
            self._s3.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=path.read_bytes(),
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=_base64(bytes.fromhex(file.sha256)),
            )
            return
        upload, done = self._begin(key)
        parts = []
        for number, content in _parts(path):
            checksum = _base64(hashlib.sha256(content).digest())
            etag = done.get(number, {}).get(checksum) or done.get(number, {}).get(hashlib.md5(content).hexdigest())
            if etag is None:
                etag = self._s3.upload_part(
                    Bucket=self._bucket,
                    Key=key,
                    UploadId=upload,
                    PartNumber=number,
                    Body=content,
                    ChecksumSHA256=checksum,
                )["ETag"]
            parts.append({"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum})
        self._s3.complete_multipart_upload(
            Bucket=self._bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
        )
        if not self._is_whole(key, file, path):
            self._s3.delete_object(Bucket=self._bucket, Key=key)
            raise KoalaError(f"s3://{self._bucket}/{key} arrived with another checksum: publish again")

    def _begin(self, key: str) -> tuple[str, dict[int, dict[str, str]]]:
        """Return an upload of the key and, by number, the checksum of each part that it has, with its ETag."""
        under = key.removeprefix(self._prefix)
        for upload in self._list("list_multipart_uploads", "Uploads", under):
            if upload["Key"] != key:
                continue
            pages = self._s3.get_paginator("list_parts").paginate(
                Bucket=self._bucket, Key=key, UploadId=upload["UploadId"]
            )
            parts = [part for page in pages for part in page.get("Parts", ())]
            return upload["UploadId"], {
                # A server that lists no checksum still names a part by its MD5, in most cases.
                part["PartNumber"]: {part.get("ChecksumSHA256") or part["ETag"].strip('"'): part["ETag"]}
                for part in parts
            }
        begun = self._s3.create_multipart_upload(
            Bucket=self._bucket, Key=key, ChecksumAlgorithm="SHA256", ChecksumType="COMPOSITE"
        )
        return begun["UploadId"], {}


def _parts(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while content := file.read(PART_BYTES):
            number += 1
            yield number, content


def _checksum(file: File, path: Path) -> str:
    """Return S3's checksum of a file: its SHA-256, or that of its parts' SHA-256 (a composite one)."""
    if file.size <= PART_BYTES:
        return _base64(bytes.fromhex(file.sha256))
    digests = [hashlib.sha256(content).digest() for _, content in _parts(path)]
    return _base64(hashlib.sha256(b"".join(digests)).digest())


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _explained(location: str) -> Iterator[None]:
    """Turn what boto3 raises into one line that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise KoalaError(
            f"no credentials for {location}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None
    except ClientError as error:
        spoilt = "a part arrived with another checksum: publish again"
        reasons = {
            "BadDigest": spoilt,
            "XAmzContentChecksumMismatch": spoilt,
            "NoSuchBucket": "there is no such bucket: create it, or put publish.targets.s3.location right",
            "AccessDenied": "these credentials may not write there: ask for s3:PutObject, s3:GetObject and s3:ListBucket",
            "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
            "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
        }
        reason = reasons.get(_code(error), f"{line_of(error)}: run it again, it resumes")
        raise KoalaError(f"cannot use {location}: {reason}") from None
    except (BotoCoreError, Boto3Error) as error:
        raise KoalaError(f"cannot use {location}: {line_of(error)}: run it again, it resumes") from None
