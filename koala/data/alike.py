"""The pairs of images that show the same picture: thumbnails and embeddings propose them, registration confirms them.

All is in tables of DuckDB, so memory does not grow with the images nor with the pairs.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from koala.console import progress
from koala.data.config import NearDuplicates
from koala.data.dedup import batches, matrix, near_pairs
from koala.data.fingerprints import EMBEDDING_HASHES, LOOK_HASHES, pattern
from koala.data.registration import correlations, pixels

if TYPE_CHECKING:
    import duckdb

_PAIRS = 256
"""Pairs of images in memory at a time."""


def propose(connection: "duckdb.DuckDBPyConnection", config: NearDuplicates) -> None:
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


def confirm(connection: "duckdb.DuckDBPyConnection", least: float) -> None:
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
