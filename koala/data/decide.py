"""The filter's second pass: from the judged tables to each sample's verdict, and the plan of the output shards.

DuckDB finds takedowns and duplicates, in a database on disk with a limit of memory.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from koala.console import progress
from koala.data.alike import confirm, propose
from koala.data.config import FilterConfig, Quota
from koala.data.dedup import Chain, Groups, batches
from koala.data.earlier_verdicts import JUDGED
from koala.data.forget import read_hashes
from koala.data.judge import FACTS, FINGERPRINTS, KEPT_FINGERPRINTS, quota_columns
from koala.data.tally import FOLDER
from koala.errors import KoalaError

if TYPE_CHECKING:
    import duckdb

Plan = Mapping[str, Sequence[str]]
"""Output shard -> the names of the input shards that it takes samples from, in their order."""

PLACES = pa.schema({"shard": pa.string(), "group": pa.int64()})
"""Columns of a verdict that depend on other samples: the output shard's file, the group of duplicates; null: none."""


def decide(judged: Sequence[Path], config: FilterConfig, state: Path, out: Path) -> Plan:
    """Write the verdicts on all samples to `out / "verdicts"`, a table for each judged one, and return the plan.

    `out / "judged"` gets what a later run needs beside them to take over what was judged. What an interrupted call has decided is
    taken over; what an earlier call has written is removed.
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
    for folder in (out / FOLDER, out / JUDGED):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    plan = _decide(judged, config, state, out)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"key": key, "plan": plan}))
    os.replace(unfinished, file)
    return plan


def _key(judged: Sequence[Path], config: FilterConfig) -> str:
    """Return a hash of all that the verdicts follow from."""
    stamps = [pq.read_schema(table).metadata[b"stamp"].decode() for table in judged]
    lists = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in config.hash_lists if Path(file).is_file()]
    return hashlib.sha256(json.dumps([config.recipe(), lists, stamps], sort_keys=True).encode()).hexdigest()


def _decide(judged: Sequence[Path], config: FilterConfig, state: Path, out: Path) -> Plan:
    import duckdb

    for left in state.glob("decide-*"):  # of a run that was killed
        shutil.rmtree(left)
    # DuckDB knows a database by its path as long as something refers to it: an error's traceback, for one. So each has its own.
    with tempfile.TemporaryDirectory(prefix="decide-", dir=state) as scratch:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{config.machine.memory_gb}GB",
            "threads": config.machine.processes,
            "temp_directory": f"{scratch}/spilled",
            "preserve_insertion_order": False,
        }
        with duckdb.connect(f"{scratch}/decide.duckdb", config=settings) as connection:
            connection.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
            tables = connection.read_parquet([str(table) for table in judged], hive_partitioning=False)
            counted = [field.name for index in range(len(config.quotas)) for field in quota_columns(index)]
            tables.select(*FACTS.names, *FINGERPRINTS.names, *counted).create_view("judged")
            _find_candidates(connection, config)
            _find_groups(connection, config)
            _decide_groups(connection)
            _apply_quotas(connection, config.quotas)
            plan = _write_verdicts(connection, judged, counted, config.shard_size, out)
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
        propose(connection, config.near_duplicates)
        confirm(connection, config.near_duplicates.registered)
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
        facts = zip(
            *(batch[name].to_pylist() for name in ("position", "number", "url", "image", "others")), strict=True
        )
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


def _apply_quotas(connection: "duckdb.DuckDBPyConnection", quotas: Sequence[Quota]) -> None:
    """Add to `decision` what is too much of one value. Raises KoalaError where no sample has a quota's column."""
    for index, quota in enumerate(quotas):
        value, best = (field.name for field in quota_columns(index))
        ((samples, valued, scored),) = connection.execute(
            f"SELECT count(*), count({value}), count({best}) FROM judged"
        ).fetchall()
        for column, there in ((quota.by, valued), (quota.best, scored)):
            if samples and column and not there:
                raise KoalaError(f"filter.quotas names {column!r}, which no sample has: carry it along in source")
        connection.execute(
            f"""
            CREATE TABLE renewed AS
            WITH kept AS (
                SELECT judged.position, {value} AS value, {best} AS best
                FROM judged LEFT JOIN decision USING (position)
                WHERE judged.rule IS NULL AND decision.rule IS NULL AND {value} IS NOT NULL
            ), too_many AS (
                SELECT position, ? AS rule FROM kept
                QUALIFY row_number() OVER (PARTITION BY value ORDER BY best DESC NULLS LAST, position) > ?
            )
            SELECT position, number, coalesce(decision.rule, too_many.rule) AS rule
            FROM decision FULL JOIN too_many USING (position) ORDER BY position
            """,
            [f"quota.{quota.by}", quota.at_most],
        )
        connection.execute("DROP TABLE decision")
        connection.execute("ALTER TABLE renewed RENAME TO decision")


def _write_verdicts(
    connection: "duckdb.DuckDBPyConnection",
    judged: Sequence[Path],
    counted: Sequence[str],
    shard_size: int,
    out: Path,
) -> Plan:
    plan: dict[str, list[str]] = {}
    kept = 0
    hidden = {*FACTS.names, *FINGERPRINTS.names, *counted}
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
        values = [name for name in table.column_names if name not in hidden]
        # Of what is taken down, nothing to look at stays.
        shown = pa.array([rule != "forgotten" for rule in rules])
        own = {name: pc.if_else(shown, table[name], None) for name in ("rule", *KEPT_FINGERPRINTS)}
        pq.write_table(pa.table(own), out / JUDGED / file.name)
        table = table.set_column(table.column_names.index("rule"), "rule", pa.array(rules, pa.string()))
        for field, column in zip(PLACES, (places, groups), strict=True):
            table = table.append_column(field, pa.array(column, field.type))
        table = table.select([*FACTS.names, *PLACES.names, *values]).replace_schema_metadata(None)
        pq.write_table(table, out / FOLDER / file.name)
    return plan
