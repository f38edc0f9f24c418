"""Readers of URL lists: parquet, CSV and JSON lines, from disk, from the Hugging Face Hub or from S3.

Keep this module light to import: `TableSource` is read with params.yaml. Readers import their libraries when they run.
"""

import ipaddress
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from koala.data.config import SourceConfig
from koala.errors import KoalaError

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}


class TableSource(SourceConfig):
    """A parquet, CSV or JSON-lines table, from disk, from a data set on the Hugging Face Hub, or from S3."""

    kind: Literal["file", "hub", "s3"]
    """Where the table is: on disk, in a data set on the Hub, or on S3."""
    location: str
    """Path (file), owner/name (hub) or s3://bucket/key (s3): the table itself or, with `files`, their folder."""
    files: tuple[str, ...] = ()
    """Files under `location`, read in this order. Required for the Hub."""
    revision: str | None = None
    """Pinned revision of the data set. Required for the Hub."""
    url_column: str = "url"
    """Column of image URLs."""
    caption_column: str = "caption"
    """Column of captions."""
    private_hosts: bool = False
    """Keep URLs that name this machine or a private address. Set it only for a list of your own."""

    @model_validator(mode="after")
    def _pinned(self) -> "TableSource":
        if self.kind == "hub" and not (self.revision and self.files):
            raise ValueError("kind 'hub' needs 'files' and a pinned 'revision'")
        return self

    def tables(self, dropped: Counter[str]) -> "Iterator[pa.Table]":
        """Yield the usable rows of each file, a batch at a time; count the others in `dropped`, by reason.

        Raises KoalaError if a file cannot be fetched or read, or lacks a column.
        """
        with tempfile.TemporaryDirectory(prefix="koala-source-") as folder:
            for file in _files(self, Path(folder)):
                yield from read_table(file, self, dropped)


def read_table(file: Path, config: TableSource, dropped: Counter[str]) -> "Iterator[pa.Table]":
    """Yield the usable rows of one file, a batch at a time; count the others in `dropped`, by reason.

    Raises KoalaError if the file cannot be read or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.dataset as ds

    try:
        dataset = ds.dataset(file, format=_format(file, config))
        wanted = [config.url_column, config.caption_column, *config.score_columns]
        if lacking := [column for column in wanted if column not in dataset.schema.names]:
            raise KoalaError(
                f"{file.name} has no column {lacking[0]!r} (it has {', '.join(dataset.schema.names)}): "
                "set url_column, caption_column and score_columns of source in params.yaml"
            )
        for batch in dataset.to_batches(columns=wanted, use_threads=False):
            if batch.num_rows:
                yield _clean(pa.Table.from_batches([batch]), config, dropped)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise KoalaError(f"cannot read the table {file}: {_first_line(error)}") from None


def _format(file: Path, config: TableSource) -> Any:
    """Return pyarrow's reader for a file's ending. It reads url and caption as text, whatever the first rows hold."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.dataset as ds
    import pyarrow.json

    name = FORMATS.get(PurePosixPath(file.name.removesuffix(".gz")).suffix.lower())
    texts = {config.url_column: pa.string(), config.caption_column: pa.string()}
    if name == "csv":
        return ds.CsvFileFormat(convert_options=pa.csv.ConvertOptions(column_types=texts))
    if name == "json":
        schema = pa.schema(list(texts.items()))
        return ds.JsonFileFormat(parse_options=pa.json.ParseOptions(explicit_schema=schema, newlines_in_values=False))
    if name is None:
        raise KoalaError(f"cannot tell what {file.name} is: name it .parquet, .csv or .jsonl (or .csv.gz, .jsonl.gz)")
    return name


def _clean(table: "pa.Table", config: TableSource, dropped: Counter[str]) -> "pa.Table":
    """Return the usable rows with columns url, caption (string) and scores (float64); count the others."""
    import pyarrow as pa

    columns = {}
    for name, column in (("url", config.url_column), ("caption", config.caption_column)):
        columns[name] = _cast(table, column, pa.string())
    columns |= {column: _cast(table, column, pa.float64()) for column in config.score_columns}
    faults = [
        row_fault(url, caption, config.private_hosts)
        for url, caption in zip(columns["url"].to_pylist(), columns["caption"].to_pylist(), strict=True)
    ]
    dropped.update(fault for fault in faults if fault)
    return pa.table(columns).filter(pa.array([fault is None for fault in faults]))


def _cast(table: "pa.Table", column: str, kind: "pa.DataType") -> "pa.ChunkedArray":
    import pyarrow as pa

    values = table[column]
    if pa.types.is_string(kind) and pa.types.is_primitive(values.type):
        raise KoalaError(f"column {column!r} holds {values.type}, not text: choose another column in params.yaml")
    try:
        return values.cast(kind)
    except pa.ArrowException:
        what = "text" if pa.types.is_string(kind) else "numbers"
        raise KoalaError(f"column {column!r} holds {values.type}, not {what}: choose another in params.yaml") from None


def row_fault(url: str | None, caption: str | None, private_hosts: bool) -> str | None:
    """Return the reason to drop a row, or None if it is usable."""
    if not url or not url.strip():
        return "no_url"
    if not caption or not caption.strip():
        return "no_caption"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is not a number raises
    except ValueError:
        return "not_http"
    if parts.scheme not in ("http", "https") or not host:
        return "not_http"
    if not private_hosts and _is_private(host):
        return "private_host"
    return None


def _is_private(host: str) -> bool:
    """Return whether a URL's host is this machine or an address outside the public internet.

    A public list has no reason to name one (OWASP, Server-Side Request Forgery). Names are not resolved: a firewall must
    block those that lead to a private address.
    """
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1, 0x7f000001 and the like
        except OSError:
            return False
    return not address.is_global


# Fetching the files.


def _files(config: TableSource, scratch: Path) -> Iterator[Path]:
    """Yield the table's files on this disk, in order. Each is fetched when it is asked for."""
    if config.kind == "file":
        return _local(config)
    if config.kind == "hub":
        return _from_hub(config)
    return _from_s3(config, scratch)


def _local(config: TableSource) -> Iterator[Path]:
    location = Path(config.location)
    for file in [location / name for name in config.files] or [location]:
        if not file.is_file():
            raise KoalaError(f"there is no file {file}: set source.location and source.files in params.yaml")
        yield file


def _from_hub(config: TableSource) -> Iterator[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = config.location
    for name in config.files:
        try:
            file = Path(hf_hub_download(repo, name, repo_type="dataset", revision=config.revision))
        except GatedRepoError:
            raise KoalaError(f"the data set {repo} is gated: accept its terms on the Hub and set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise KoalaError(
                f"the Hub has no data set {repo}, or it is private: check source.location, set HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise KoalaError(f"the data set {repo} has no revision {config.revision}: set source.revision") from None
        except LocalEntryNotFoundError:
            raise KoalaError(
                f"cannot reach the Hub for {repo}/{name}, and it is not in the cache: check the network"
            ) from None
        except EntryNotFoundError:
            raise KoalaError(f"the data set {repo} has no file {name} at {config.revision}: set source.files") from None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise KoalaError(f"cannot fetch {name} of {repo} from the Hub: {_first_line(error)}") from None
        yield file


def _from_s3(config: TableSource, scratch: Path) -> Iterator[Path]:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    parts = urlsplit(config.location)
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if parts.scheme != "s3" or not bucket or not (prefix or config.files):
        raise KoalaError(f"source.location is {config.location!r}: write it as s3://bucket/key")
    keys = [f"{prefix}/{name}".lstrip("/") for name in config.files] or [prefix]
    try:
        client = boto3.Session().client("s3")
        for index, key in enumerate(keys):
            file = scratch / f"{index}-{PurePosixPath(key).name}"
            client.download_file(bucket, key, str(file))
            yield file
            file.unlink()
    except NoCredentialsError:
        raise KoalaError(
            "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None
    except (BotoCoreError, Boto3Error, ClientError) as error:
        raise KoalaError(f"cannot fetch {config.location} from S3: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
