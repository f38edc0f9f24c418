"""The URL table: what to fetch, and what each picture is said to show.

`source/table.parquet` holds url, caption (text) and the score columns (float64); `source/stats.json` what was dropped.
"""

import ipaddress
import json
import math
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from koala.console import say
from koala.data.config import SourceConfig
from koala.errors import KoalaError
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from koala.config import Params
    from koala.tracking import StageRun

TABLE = "table.parquet"

# The faults that koala.demo.server knows, and copies, as shares of a table of shapes. Slow ones cost a time-out each.
FAULT_SHARES = {
    "missing": 0.02,
    "error": 0.01,
    "flaky": 0.01,
    "slow": 0.001,
    "html": 0.01,
    "truncated": 0.01,
    "tiny": 0.01,
    "copy": 0.02,
}
BAD_CAPTION_SHARE = 0.03
BAD_CAPTIONS = (
    "{colour}",
    "a {colour} {shape}, more at https://example.com/{index}",
    "a picture named IMG_{index:04d}.jpg",
    "buy now: a {colour} {shape} at half the price",
    "{background} 背景 の 上 に {colour} 図形",
)

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}


def run(params: "Params", run: "StageRun") -> None:
    """Write the table of `params.source` to the stage's out. Raises KoalaError where the list cannot be read."""
    config = params.source
    work = resume_folder("source", config=config.model_dump())
    if config.kind == "shapes":
        stats = write_table([shapes_table(config)], Counter(), work / TABLE, config.rows)
    else:
        dropped: Counter[str] = Counter()
        with ExitStack() as stack:
            files = _files(config, stack)
            batches = (clean for file in files for clean in read_table(file, config, dropped))
            stats = write_table(batches, dropped, work / TABLE, config.rows)
    if not stats["rows"]:
        raise KoalaError(
            f"{config.location} holds no usable row (dropped: {stats['dropped']}): see source in params.yaml"
        )
    (work / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    run.metrics({"rows": stats["rows"]} | {f"dropped.{why}": count for why, count in stats["dropped"].items()})
    run.artifact(work / "stats.json")
    say(f"source: {stats['rows']} rows, {sum(stats['dropped'].values())} dropped")
    finish(work, params.out("source"))


def write_table(
    batches: "Iterator[pa.Table] | list[pa.Table]", dropped: Counter[str], path: Path, rows: int | None
) -> dict[str, Any]:
    """Write clean tables, `rows` in all at most, to one parquet file. Returns the counts."""
    import pyarrow.parquet as pq

    written = 0
    writer = None
    try:
        for batch in batches:
            batch = batch.slice(0, None if rows is None else rows - written)
            writer = writer or pq.ParquetWriter(path, batch.schema)
            writer.write_table(batch)
            written += batch.num_rows
            if written == rows:
                break
    finally:
        if writer:
            writer.close()
    return {"rows": written, "dropped": dict(sorted(dropped.items()))}


# A table of shapes.


def shapes_table(config: SourceConfig) -> "pa.Table":
    """Rows for the scenes 0 .. rows-1 of the series `seed`, with faults in fixed shares at places drawn by `seed`.

    Each kind of fault occurs at least once. A copy repeats the picture of an earlier good row. Scores are drawn at
    random, around 5.5 of 10.
    """
    import numpy as np
    import pyarrow as pa

    from koala.demo import shapes

    rows = config.rows or 0
    random = np.random.default_rng((config.seed, rows))
    kinds = _kinds(rows, random)
    urls, captions = [], []
    good: list[int] = []
    for index, kind in enumerate(kinds):
        pictured = index
        if kind == "copy":
            pictured = int(random.choice(good))
        elif kind == "ok":
            good.append(index)
        scene = shapes.sample_scene(config.seed, pictured)
        if kind == "bad caption":
            template = BAD_CAPTIONS[int(random.integers(len(BAD_CAPTIONS)))]
            caption = template.format(index=index, **vars(scene.attributes))
        else:
            caption = shapes.caption(scene, config.seed, pictured)
        folder = "ok" if kind == "bad caption" else kind
        urls.append(f"{config.location.rstrip('/')}/{folder}/{pictured:05d}.jpg")
        captions.append(caption)
    scores = {column: random.normal(5.5, 1.0, rows).clip(0, 10).round(3) for column in config.score_columns}
    return pa.table({"url": urls, "caption": captions} | scores)


def _kinds(rows: int, random: Any) -> list[str]:
    """What each row is: `ok`, a fault or a bad caption. The first row is good, so that a copy has something to copy."""
    kinds = [kind for kind, share in FAULT_SHARES.items() for _ in range(math.ceil(share * rows))]
    kinds += ["bad caption"] * math.ceil(BAD_CAPTION_SHARE * rows)
    if len(kinds) >= rows:
        raise KoalaError(f"source.rows: {rows} are too few for a table of shapes; take 20 or more")
    kinds += ["ok"] * (rows - 1 - len(kinds))
    return ["ok", *(kinds[place] for place in random.permutation(len(kinds)))]


# A table that someone else made.


def read_table(file: Path, config: SourceConfig, dropped: Counter[str]) -> "Iterator[pa.Table]":
    """Yield the usable rows of a parquet, CSV or JSON-lines file, a batch at a time, and count the others in `dropped`.

    Raises KoalaError where the file cannot be read or lacks a column.
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


def _format(file: Path, config: SourceConfig) -> Any:
    """The reader for a file's ending; url and caption are text, whatever the first rows look like."""
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


def _clean(table: "pa.Table", config: SourceConfig, dropped: Counter[str]) -> "pa.Table":
    """The usable rows, under the names url and caption, scores as float64."""
    import pyarrow as pa

    columns = {}
    for name, column in (("url", config.url_column), ("caption", config.caption_column)):
        columns[name] = _cast(table, column, pa.string())
    columns |= {column: _cast(table, column, pa.float64()) for column in config.score_columns}
    faults = [
        _fault(url, caption, config.private_hosts)
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


def _fault(url: str | None, caption: str | None, private_hosts: bool) -> str | None:
    """Why a row is of no use; None where it is."""
    if not url or not url.strip():
        return "no_url"
    if not caption or not caption.strip():
        return "no_caption"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is no number raises
    except ValueError:
        return "not_http"
    if parts.scheme not in ("http", "https") or not host:
        return "not_http"
    if not private_hosts and _is_private(host):
        return "private_host"
    return None


def _is_private(host: str) -> bool:
    """Whether a URL's host is this machine or an address that is not of the public internet.

    A public list has no business there (OWASP, Server-Side Request Forgery). Names are not looked up: one that leads to
    a private address is for the firewall to stop.
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


# Where its files are.


def _files(config: SourceConfig, stack: ExitStack) -> Iterator[Path]:
    """The table's files on this disk, in order, each fetched when it is asked for."""
    if config.kind == "file":
        return _local(config)
    if config.kind == "hub":
        return _from_hub(config)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="koala-source-")))
    return _from_s3(config, folder)


def _local(config: SourceConfig) -> Iterator[Path]:
    location = Path(config.location)
    for file in [location / name for name in config.files] or [location]:
        if not file.is_file():
            raise KoalaError(f"there is no file {file}: set source.location and source.files in params.yaml")
        yield file


def _from_hub(config: SourceConfig) -> Iterator[Path]:
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
            yield Path(hf_hub_download(repo, name, repo_type="dataset", revision=config.revision))
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


def _from_s3(config: SourceConfig, folder: Path) -> Iterator[Path]:
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
        for number, key in enumerate(keys):
            file = folder / f"{number}-{PurePosixPath(key).name}"
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
