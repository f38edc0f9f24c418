"""The filter's second pass: from the judged tables to each sample's verdict, and the plan of the output shards.

DuckDB finds takedowns and duplicates, in a database on disk with a limit of memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from koala.console import progress
from koala.data.config import FilterConfig, NearDuplicates
from koala.data.dedup import Chain, Groups, batches, matrix, near_pairs
from koala.data.fingerprints import pattern
from koala.data.forget import read_hashes
from koala.data.judge import EMBEDDING_HASHES, FACTS, FINGERPRINTS, LOOK_HASHES
from koala.data.registration import correlations, pixels

if TYPE_CHECKING:
    import duckdb

Plan = Mapping[str, Sequence[str]]
"""Output shard -> the names of the input shards that it takes samples from, in their order."""

PLACES = pa.schema({"shard": pa.string(), "group": pa.int64()})
"""Columns of a verdict that depend on other samples: the output shard's file, the group of duplicates; null: none."""


def decide(judged: Sequence[Path], config: FilterConfig, state: Path, out: Path) -> Plan:
    """Write the verdicts on all samples to `out / "verdicts"`, a table for each judged one, and return the plan.

    What an interrupted call has decided is taken over; what an earlier call has written is removed.
    """
    file = state / "plan.json"
    key = _key(judged, config)
    if file.is_file():
        found = json.loads(file.read_text())
        if found["key"] == key:
            return dict(found["plan"])
        file.unlink()
    for left in (*out.glob("*.tar"), *out.glob("*.json"), *out.glob("*.png"), *out.glob("*.html")):
        left.unlink()
    verdicts = out / "verdicts"
    shutil.rmtree(verdicts, ignore_errors=True)
    verdicts.mkdir()
    plan = _decide(judged, config, state, verdicts)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"key": key, "plan": plan}))
    os.replace(unfinished, file)
    return plan


def _key(judged: Sequence[Path], config: FilterConfig) -> str:
    """Return a hash of all that the verdicts follow from."""
    stamps = [pq.read_schema(table).metadata[b"stamp"].decode() for table in judged]
    lists = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in config.hash_lists if Path(file).is_file()]
    return hashlib.sha256(json.dumps([config.recipe(), lists, stamps], sort_keys=True).encode()).hexdigest()


def _decide(judged: Sequence[Path], config: FilterConfig, state: Path, verdicts: Path) -> Plan:
    import duckdb

    database = state / "decide.duckdb"
    scratch = state / "decide"
    shutil.rmtree(scratch, ignore_errors=True)
    for left in state.glob("decide.duckdb*"):
        left.unlink()
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{config.machine.memory_gb}GB",
        "threads": config.machine.processes,
        "temp_directory": str(scratch),
        "preserve_insertion_order": False,
    }
    with duckdb.connect(str(database), config=settings) as connection:
        connection.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
        tables = connection.read_parquet([str(table) for table in judged], hive_partitioning=False)
        tables.select(*FACTS.names, *FINGERPRINTS.names).create_view("judged")
        _find_candidates(connection, config)
        _find_groups(connection, config)
        _decide_groups(connection)
        plan = _write_verdicts(connection, judged, config.shard_size, verdicts)
    for left in state.glob("decide.duckdb*"):
        left.unlink()
    shutil.rmtree(scratch, ignore_errors=True)
    return plan


def _find_candidates(connection: "duckdb.DuckDBPyConnection", config: FilterConfig) -> None:
    """Make `candidate`: the samples that break no rule by themselves, and those that are taken down."""
    exact, perceptual = read_hashes(config.hash_lists)
    exact += [bytes.fromhex(entry.sha256) for entry in config.forget if entry.sha256]
    near = [(value, 4) for value in perceptual]
    near += [(int(entry.dhash, 16), entry.bits) for entry in config.forget if entry.dhash]
    tables = {
        "forgotten_url": pa.table({"url": pa.array([entry.url for entry in config.forget if entry.url], pa.string())}),
        "forgotten_image": pa.table({"sha256": pa.array(exact, pa.binary())}),
        "forgotten_hash": pa.table(
            {
                "dhash": pa.array([value for value, _ in near], pa.uint64()),
                "bits": pa.array([bits for _, bits in near], pa.int32()),
            }
        ),
    }
    for name, table in tables.items():
        connection.register(name, table)
    connection.execute(
        """
        CREATE TABLE candidate AS SELECT * FROM (
            SELECT
                position, sha256, url, original_width::BIGINT * original_height AS pixels, rule,
                url IN (FROM forgotten_url) OR sha256 IN (FROM forgotten_image)
                OR coalesce(fetched_sha256 IN (FROM forgotten_image), false) OR position IN (
                    SELECT position FROM judged JOIN forgotten_hash
                    ON bit_count(xor(judged.dhash, forgotten_hash.dhash)) <= forgotten_hash.bits
                ) AS forgotten
            FROM judged
        ) WHERE rule IS NULL OR forgotten
        """
    )


def _find_groups(connection: "duckdb.DuckDBPyConnection", config: FilterConfig) -> None:
    """Make `member`: the candidates that have duplicates, with their group: pairs joined, chains that pairs make cut again."""
    groups = Groups()
    for column, there in (("sha256", "true"), ("url", "url <> ''")):
        pairs = f"""
            SELECT position, first FROM (
                SELECT position, min(position) OVER (PARTITION BY {column}) AS first FROM candidate WHERE {there}
            ) WHERE position > first
        """
        for batch in batches(connection, pairs):
            groups.add(batch["position"].to_numpy(), batch["first"].to_numpy())
    if config.near_duplicates:
        _propose(connection, config.near_duplicates)
        _confirm(connection, config.near_duplicates.registered)
        for batch in batches(connection, "SELECT position, other FROM same WHERE position < other"):
            groups.add(batch["position"].to_numpy(), batch["other"].to_numpy())
    positions, numbers = groups.members()
    connection.register("grouped", pa.table({"position": positions, "number": numbers}))
    connection.execute("CREATE TABLE member AS SELECT candidate.*, number FROM candidate JOIN grouped USING (position)")
    if config.near_duplicates:
        _cut_chains(connection)


def _cut_chains(connection: "duckdb.DuckDBPyConnection") -> None:
    """Renew `member`: in each group, every image is the same picture as the one that stays, not only as another one.

    The largest image takes those that are confirmed to be like it, of the others the largest takes those that are like it, and so
    on. A group of which one is taken down stays as it is.
    """
    members = """
        SELECT member.position, number, member.url, image, others
        FROM member
        JOIN (SELECT position, min(position) OVER (PARTITION BY sha256) AS image FROM candidate) AS named USING (position)
        LEFT JOIN (SELECT position, list(other) AS others FROM same GROUP BY position) AS alike ON alike.position = image
        WHERE number NOT IN (SELECT number FROM member WHERE forgotten)
        ORDER BY number, pixels DESC, member.position
    """
    positions, heads = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    chain, number = Chain(), -1
    for batch in batches(connection, members):
        found = []
        facts = zip(*(batch[name].to_pylist() for name in ("position", "number", "url", "image", "others")), strict=True)
        for position, of, url, image, others in facts:
            if of != number:
                chain, number = Chain(), of
            found.append(chain.head(position, {image, url} - {""}, others or ()))
        positions.append(batch["position"].to_numpy())
        heads.append(np.array(found, np.int64))
    connection.register("cut", pa.table({"position": np.concatenate(positions), "head": np.concatenate(heads)}))
    connection.execute(
        """
        CREATE TABLE renewed AS SELECT * EXCLUDE (number, head, first, size), dense_rank() OVER (ORDER BY first) - 1 AS number
        FROM (
            SELECT *, min(position) OVER (PARTITION BY head) AS first, count(*) OVER (PARTITION BY head) AS size
            FROM (SELECT member.*, coalesce(head, -1 - number) AS head FROM member LEFT JOIN cut USING (position))
        ) WHERE size > 1
        """
    )
    connection.execute("DROP TABLE member")
    connection.execute("ALTER TABLE renewed RENAME TO member")


def _propose(connection: "duckdb.DuckDBPyConnection", config: NearDuplicates) -> None:
    """Make `proposed`: pairs of candidates that look alike. Equal images stand for one: they would be neighbours everywhere."""
    connection.execute(
        """
        CREATE TABLE picture AS SELECT * EXCLUDE (miniature) FROM judged
        WHERE dhash IS NOT NULL AND position IN (SELECT min(position) FROM candidate GROUP BY sha256)
        """
    )
    connection.execute("CREATE TABLE proposed (position BIGINT, other BIGINT)")
    for column in progress(LOOK_HASHES, "filter: near duplicates"):
        query = f"SELECT position, {column} AS key, thumbnail FROM picture"
        _append(connection, "proposed", near_pairs(connection, query, _patterns, config.thumbnail))
    if config.cosine is not None:
        for column in progress(EMBEDDING_HASHES, "filter: near embeddings"):
            query = f"SELECT position, {column} AS key, embedding FROM picture WHERE embedding IS NOT NULL"
            _append(connection, "proposed", near_pairs(connection, query, _embeddings, config.cosine))


def _confirm(connection: "duckdb.DuckDBPyConnection", least: float) -> None:
    """Make `same`: the proposed pairs that show the same picture, each in both directions."""
    connection.execute("CREATE TABLE same (position BIGINT, other BIGINT)")
    connection.execute(
        """
        CREATE TABLE pair AS
        SELECT DISTINCT least(position, other) AS position, greatest(position, other) AS other FROM proposed
        """
    )
    ((count,),) = connection.execute("SELECT count(*) FROM pair").fetchall()
    pairs = """
        SELECT pair.position, other, one.miniature AS one, two.miniature AS two
        FROM pair JOIN judged AS one ON one.position = pair.position JOIN judged AS two ON two.position = other
    """
    found = (_registered(batch, least) for batch in batches(connection, pairs, _PAIRS))
    _append(connection, "same", progress(found, "filter: pairs compared", total=-(-count // _PAIRS)))


_PAIRS = 1024
"""Pairs of images in memory at a time."""


def _registered(pairs: pa.RecordBatch, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the pairs that show the same picture, in both directions."""
    one, two = (pixels(pairs[name].to_pylist()) for name in ("one", "two"))
    found = correlations(one, two) >= least
    position, other = (pairs[name].to_numpy()[found] for name in ("position", "other"))
    return np.concatenate([position, other]), np.concatenate([other, position])


def _append(
    connection: "duckdb.DuckDBPyConnection", table: str, pairs: Iterable[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Add pairs to a table, as they come: from a query that is still being read."""
    with connection.cursor() as writer:
        for position, other in pairs:
            writer.register("found", pa.table({"position": position, "other": other}))
            writer.execute(f"INSERT INTO {table} FROM found")


def _patterns(rows: pa.Table) -> np.ndarray:
    return pattern(matrix(rows["thumbnail"], np.uint8))


def _embeddings(rows: pa.Table) -> np.ndarray:
    return matrix(rows["embedding"], np.float16)


def _decide_groups(connection: "duckdb.DuckDBPyConnection") -> None:
    """Make `decision`: the rule and the group of each sample that has duplicates or is taken down.

    Of a group, the image with the most pixels stays, and the first of these; none of a group of which one is taken down.
    """
    connection.execute(
        """
        CREATE TABLE decision AS
        SELECT position, number, CASE
            WHEN bool_or(forgotten) OVER (PARTITION BY number) THEN 'forgotten'
            WHEN row_number() OVER (PARTITION BY number ORDER BY pixels DESC, position) = 1 THEN NULL
            WHEN row_number() OVER (PARTITION BY sha256 ORDER BY pixels DESC, position) > 1 THEN 'duplicate_image'
            WHEN url <> '' AND row_number() OVER (PARTITION BY url ORDER BY pixels DESC, position) > 1 THEN 'duplicate_url'
            ELSE 'near_duplicate'
        END AS rule FROM member
        UNION ALL
        SELECT position, NULL, 'forgotten' FROM candidate
        WHERE forgotten AND position NOT IN (SELECT position FROM member)
        ORDER BY position
        """
    )


def _write_verdicts(
    connection: "duckdb.DuckDBPyConnection", judged: Sequence[Path], shard_size: int, verdicts: Path
) -> Plan:
    plan: dict[str, list[str]] = {}
    kept = 0
    for index, file in enumerate(progress(judged, "filter: verdicts")):
        table = pq.read_table(file)
        decided = {
            position: (rule, number)
            for position, rule, number in connection.execute(
                "SELECT position, rule, number FROM decision WHERE position >= ? AND position < ?",
                [index << 32, (index + 1) << 32],
            ).fetchall()
        }
        rules, places, groups = [], [], []
        for position, own in zip(table["position"].to_pylist(), table["rule"].to_pylist(), strict=True):
            rule, group = decided.get(position, (own, None))
            place = None
            if rule is None:
                place = f"{kept // shard_size:05d}.tar"
                kept += 1
                sources = plan.setdefault(place, [])
                if file.stem not in sources[-1:]:
                    sources.append(file.stem)
            rules.append(rule)
            places.append(place)
            groups.append(group)
        values = [name for name in table.column_names if name not in (*FACTS.names, *FINGERPRINTS.names)]
        table = table.set_column(table.column_names.index("rule"), "rule", pa.array(rules, pa.string()))
        for field, column in zip(PLACES, (places, groups), strict=True):
            table = table.append_column(field, pa.array(column, field.type))
        table = table.select([*FACTS.names, *PLACES.names, *values]).replace_schema_metadata(None)
        pq.write_table(table, verdicts / file.name)
    return plan
