"""Which rows of a list are usable: those with a caption, a public URL and values within bounds, each URL once."""

import ipaddress
import socket
import tempfile
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from koala.data.addresses import is_public
from koala.data.table_config import TableConfig

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

# A public name with a port, if any, that is a number: nothing about such a URL is in doubt. The rest is looked at one by one.
_PLAIN = r"(?i)^https?://([a-z0-9_-]+\.)+[a-z][a-z0-9-]*(:[0-9]{1,4})?([/?#]|$)"
_INSIDE = r"(?i)^https?://[^/?#]*\.(local|localhost|internal)([:/?#]|$)"
_LOCAL = (".localhost", ".local", ".internal")
_IN_DOUBT = "?"

PIECE = 2**20
"""Hashes that are merged at a time. Runs of as many are in files."""


class Usable:
    """Takes batches of rows and gives those that are usable, in order, up to the number that is wanted."""

    def __init__(self, config: TableConfig, dropped: Counter[str]) -> None:
        """Count rows that are not usable in `dropped`, by reason."""
        self._config = config
        self._dropped = dropped
        self._left = config.rows
        self._urls = Seen()

    @property
    def enough(self) -> bool:
        """Return whether there are as many rows as wanted."""
        return self._left == 0

    def of(self, batch: "pl.DataFrame") -> "pl.DataFrame":
        """Return the usable rows of a batch: url, caption, scores and carried columns."""
        import polars as pl

        config = self._config
        batch = batch.with_columns(pl.col(config.url_column).str.strip_chars())
        faults = self._faults(batch)
        kept = [config.url_column, config.caption_column, *config.score_columns, *config.carry]
        if self._left is not None:
            usable = faults.is_null()
            up_to_enough = usable.cum_sum() - usable.cast(pl.UInt32) < self._left
            batch, faults = batch.filter(up_to_enough), faults.filter(up_to_enough)
            self._left -= faults.null_count()
        self._dropped.update(faults.drop_nulls().to_list())
        names = ["url", "caption", *kept[2:]]
        columns = [batch[column].alias(name) for column, name in zip(kept, names, strict=True)]
        return pl.DataFrame(columns).filter(faults.is_null())

    def _faults(self, batch: "pl.DataFrame") -> "pl.Series":
        """Return the reason to drop each row, or null."""
        import polars as pl

        url, caption = pl.col(self._config.url_column), pl.col(self._config.caption_column)
        fault = (
            pl.when(url.is_null() | (url == ""))
            .then(pl.lit("no_url"))
            .when(caption.is_null() | (caption.str.strip_chars() == ""))
            .then(pl.lit("no_caption"))
            .when(~url.str.contains(_PLAIN) | url.str.contains(_INSIDE))
            .then(pl.lit(_IN_DOUBT))
        )
        faults = batch.select(fault.alias("fault"))["fault"]
        places = (faults == _IN_DOUBT).fill_null(False).arg_true()
        if len(places):
            urls = batch[self._config.url_column].gather(places)
            judged = [url_fault(each, self._config.private_hosts) for each in urls]
            faults = faults.scatter(places, pl.Series(judged, dtype=pl.String))
        faults = batch.select(pl.coalesce(faults, self._outside()).alias("fault"))["fault"]
        first = self._urls.new(batch[self._config.url_column].hash(0).to_numpy(), faults.is_null().to_numpy())
        return pl.select(pl.when(faults.is_null() & ~pl.Series(first)).then(pl.lit("duplicate_url")).otherwise(faults))[
            "literal"
        ]

    def _outside(self) -> "pl.Expr":
        """Return `where.COLUMN` of the first column that is out of its bounds, or null."""
        import polars as pl

        reasons = [pl.lit(None, dtype=pl.String)]
        for column, bounds in self._config.where.items():
            value = pl.col(column)
            inside = value.is_not_nan()
            if bounds.at_least is not None:
                inside &= value >= bounds.at_least
            if bounds.at_most is not None:
                inside &= value <= bounds.at_most
            reasons.append(pl.when(inside.fill_null(False)).then(None).otherwise(pl.lit(f"where.{column}")))
        return pl.coalesce(reasons)


class Seen:
    """Hashes that came before, 8 bytes each: sorted runs, of which like sizes are merged."""

    def __init__(self) -> None:
        """Begin with none."""
        self._runs: list[np.ndarray] = []

    def new(self, hashes: "np.ndarray", among: "np.ndarray") -> "np.ndarray":
        """Return which of the hashes that are `among` come for the first time, and remember them."""
        import numpy as np

        places = np.flatnonzero(among)
        unique, first = np.unique(hashes[places], return_index=True)
        fresh = np.ones(len(unique), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            fresh &= run[at] != unique
        if fresh.any():
            self._runs.append(unique[fresh])
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [_merged(*self._runs[-2:])]
        found = np.zeros(len(hashes), bool)
        found[places[first[fresh]]] = True
        return found


def _merged(one: "np.ndarray", other: "np.ndarray") -> "np.ndarray":
    """Return the hashes of two sorted runs as one. A long run is mapped from a file, of which memory can be short.

    The file is in the system's temporary folder. It has no name, so that none is left behind, however the process ends.
    """
    import numpy as np

    if len(one) + len(other) < PIECE:
        return np.sort(np.concatenate([one, other]), kind="stable")
    short, long = sorted((one, other), key=len)
    with tempfile.TemporaryFile() as file:
        begin = 0
        for first in range(0, len(long), PIECE):
            after = long[first + PIECE : first + PIECE + 1]
            end = int(np.searchsorted(short, after[0])) if len(after) else len(short)
            piece = np.concatenate([long[first : first + PIECE], short[begin:end]])
            file.write(np.sort(piece, kind="stable").data)
            begin = end
        file.flush()
        return np.asarray(np.memmap(file, np.uint64, "r"))


def url_fault(url: str, private_hosts: bool) -> str | None:
    """Return why a URL is not used, `not_http` or `private_host`; None if it is."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is not a number raises
    except ValueError:
        return "not_http"
    if parts.scheme not in ("http", "https") or not host:
        return "not_http"
    return "private_host" if not private_hosts and _is_private(host) else None


def _is_private(host: str) -> bool:
    """Return whether a URL's host is this machine or an address outside the public internet.

    A public list has no reason to name one (OWASP, Server-Side Request Forgery). Names are not resolved here: the download
    checks the address of every connection.
    """
    host = host.rstrip(".")
    try:
        address = str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        try:
            address = socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f000001 and the like
        except (OSError, UnicodeError):
            return "." not in host or host.endswith(_LOCAL)
    return not is_public(address)
