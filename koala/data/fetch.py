"""Fetching of one image from a URL that nobody has vouched for.

    fetcher = Fetcher(config)
    content, cause = fetcher.fetch("https://example.com/a.jpg")     # bytes, or why there are none

Bounds: a deadline for the whole request, a limit of bytes, public addresses only, few requests to a host at a time. Answers that
say no are final. Environment variables of proxies are not read: a proxy would connect in our place, unchecked.
"""

import contextlib
import http.client
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import certifi
from pydantic import Field

from koala.config import Config
from koala.data.addresses import AddressRefusedError, Resolve, connect, resolve

REDIRECTS = 5
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes after which a URL is asked again. Any other error is final."""

_FINAL = frozenset({"opted out of AI training", "a page, no image", "too many redirects", "no web address"})
"""Causes, beside a status, that another day would give too: none of the network, of a host's settings, of this machine's limits."""

_CHUNK = 2**16  # bytes
_LONGEST_PAUSE = 60.0  # seconds that a server's Retry-After may ask for; a longer one ends the attempts
_FIRST_PAUSE = 0.25  # seconds before a URL is asked again, doubled each time
_ROBOTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_TOKEN = "koala"  # what a header that is meant for us alone calls us
_WITH_VALUES = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
_USES = frozenset({"ai", "train-ai", "train-genai", "genai"})


class FetchConfig(Config):
    """How one image is fetched."""

    timeout: float = Field(default=10, gt=0)
    """Seconds that a server may be silent."""
    deadline: float = Field(default=60, gt=0)
    """Seconds that a whole request may take, redirects included."""
    retries: int = Field(default=1, ge=0)
    """Further attempts after a failure that may pass: a time-out, a lost connection, a server's error."""
    per_host: int = Field(default=16, gt=0)
    """Requests of one process to one host at a time."""
    max_bytes: int = Field(default=20_000_000, gt=0)
    """Bytes of an answer at most."""
    contact: str | None = None
    """A page or an address by which a site's owner reaches you. Every request names it."""


class Fetcher:
    """Fetches images. It may be shared by threads: what a host asked for binds all of them."""

    def __init__(self, config: FetchConfig, allow: Collection[str] = (), resolver: Resolve = resolve) -> None:
        """Take the bounds, `HOST:PORT`s that need not be public, and what gives a host's addresses."""
        self._config = config
        self._allow = allow
        self._resolver = resolver
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    def fetch(self, url: str) -> tuple[bytes, None] | tuple[None, str]:
        """Return an answer's body, or the cause of failure: a few words without digits but a status code."""
        cause = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                return self._follow(url), None
            except _FinalError as error:
                return None, str(error)
            except _PassingError as error:
                cause = str(error)
        return None, cause

    def _follow(self, url: str) -> bytes:
        """Return the body at the end of all redirects."""
        deadline = time.monotonic() + self._config.deadline
        first = _split(url)
        # A server of ours is let in for the list's own URLs: no other site's redirect leads there.
        allow = self._allow if f"{first.hostname}:{first.port}" in self._allow else ()
        for _ in range(REDIRECTS + 1):
            parts = _split(url)
            with self._turn(parts.hostname, deadline):
                location, body = self._request(parts, deadline, allow)
            if location is None:
                return body
            try:
                url = urljoin(url, location)
            except ValueError:  # brackets that hold no address
                raise _FinalError("no web address") from None
        raise _FinalError("too many redirects")

    @contextmanager
    def _turn(self, name: str, deadline: float) -> Iterator[None]:
        """Wait for a host's turn. A host is forgotten when nobody asks it: a list can name millions."""
        with self._lock:
            host = self._hosts.setdefault(name, _Host(self._config.per_host))
            host.guests += 1
        try:
            with host.turn(deadline):
                yield
        finally:
            with self._lock:
                host.guests -= 1
                if not host.guests and not host.pauses:
                    del self._hosts[name]

    def _request(self, parts: "_Parts", deadline: float, allow: Collection[str]) -> tuple[str | None, bytes]:
        """Return where a redirect leads, or None and the body."""
        with _explained(), self._connection(parts, deadline, allow) as connection:
            connection.request("GET", parts.target, headers=self._headers)
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
                return _utf_8(answer.headers["Location"]), b""
            if answer.status in TRANSIENT:
                self._pause(parts.hostname, answer)
                raise _PassingError(f"status {answer.status}")
            if answer.status != 200:
                raise _FinalError(f"status {answer.status}")
            if opted_out(answer.headers):
                raise _FinalError("opted out of AI training")
            if answer.headers.get_content_type() in ("text/html", "application/json", "application/xhtml+xml"):
                raise _FinalError("a page, no image")
            return None, self._body(answer)

    def _body(self, answer: http.client.HTTPResponse) -> bytes:
        """Read a body of `max_bytes` at most."""
        limit, chunks, size = self._config.max_bytes, [], 0
        if answer.length is not None and answer.length > limit:
            raise _FinalError("too many bytes")
        while chunk := answer.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise _FinalError("too many bytes")
        if answer.length:
            raise _PassingError("cut off")
        return _plain(b"".join(chunks), answer.headers["Content-Encoding"], limit)

    @contextmanager
    def _connection(self, parts: "_Parts", deadline: float, allow: Collection[str]) -> Iterator["_Connection"]:
        """Yield a connection that is shut at the deadline, whatever it is doing: a server may send a byte a second."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise _PassingError("deadline")
        opening = partial(
            connect, parts.hostname, parts.port, self._config.timeout, deadline, allowed=allow, resolver=self._resolver
        )
        connection = _Connection(opening, parts, self._tls)
        timer = threading.Timer(left, connection.shut)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        except (OSError, ValueError, http.client.HTTPException, _PassingError):
            if time.monotonic() >= deadline:
                raise _PassingError("deadline") from None
            raise
        finally:
            timer.cancel()
            connection.close()
        if time.monotonic() >= deadline:  # an end that was shut reads like an end
            raise _PassingError("deadline")

    def _pause(self, host: str, answer: http.client.HTTPResponse) -> None:
        """Let nobody ask the host until it said it may be asked. A longer pause than a minute ends the attempts."""
        seconds = retry_after(answer.headers["Retry-After"])
        if seconds is None:
            return
        if seconds > _LONGEST_PAUSE:
            raise _FinalError(f"status {answer.status}")
        self._hosts[host].not_before(time.monotonic() + seconds)

    @cached_property
    def _headers(self) -> dict[str, str]:
        contact = f" (+{self._config.contact})" if self._config.contact else ""
        return {"User-Agent": f"koala/{_version()}{contact}", "Accept": "image/*", "Accept-Encoding": "identity"}

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=certifi.where())


class _Connection(http.client.HTTPConnection):
    """A connection whose socket comes from `connect`, and can be shut by another thread in the middle of a read."""

    def __init__(self, open_socket: Callable[[], socket.socket], parts: "_Parts", tls: ssl.SSLContext) -> None:
        super().__init__(parts.hostname, parts.port)
        self._open_socket = open_socket
        self._tls = tls if parts.scheme == "https" else None
        self._opened: socket.socket | None = None  # a response takes `sock` away
        self._shut = False

    def connect(self) -> None:
        """Open the socket; TLS is for the host's name, not for the address that was checked."""
        self.sock = self._opened = self._open_socket()
        if self._tls:
            secured = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock = self._opened = secured
            if not self._shut:
                secured.do_handshake()
        if self._shut:  # before there was anything to shut
            raise TimeoutError

    def shut(self) -> None:
        """End every read and write, also of a connection that is not open yet."""
        self._shut = True
        if self._opened:
            with contextlib.suppress(OSError):
                self._opened.shutdown(socket.SHUT_RDWR)


class _Host:
    """What binds the requests to one host."""

    def __init__(self, at_once: int) -> None:
        self._slots = threading.BoundedSemaphore(at_once)
        self._not_before = 0.0
        self.guests = 0
        """Requests that wait or are under way."""

    @property
    def pauses(self) -> bool:
        """Return whether it may not be asked now."""
        return time.monotonic() < self._not_before

    @contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """Wait for a free slot and for the end of a pause. Raises _PassingError at the deadline."""
        if not self._slots.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise _PassingError("deadline")
        try:
            pause = self._not_before - time.monotonic()
            if pause > deadline - time.monotonic():
                raise _PassingError("deadline")
            time.sleep(max(pause, 0))
            yield
        finally:
            self._slots.release()

    def not_before(self, moment: float) -> None:
        self._not_before = max(self._not_before, moment)


def is_final(cause: str) -> bool:
    """Return whether a failure, by the cause that `Fetcher.fetch` gave, is an outcome to remember: to ask again is no use."""
    status = cause.removeprefix("status ")
    return cause in _FINAL or (status.isdigit() and int(status) not in TRANSIENT)


class _FinalError(Exception):
    """A failure that another attempt would repeat."""


class _PassingError(Exception):
    """A failure that may pass."""


@dataclass(frozen=True)
class _Parts:
    """A URL in ASCII, as it is sent."""

    scheme: str
    hostname: str
    port: int
    target: str


def _split(url: str) -> _Parts:
    """Return the parts of a URL or IRI. Raises _FinalError for one that cannot be fetched."""
    ascii_url = quoted(url)
    if ascii_url is None:
        raise _FinalError("no web address")
    parts = urlsplit(ascii_url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return _Parts(parts.scheme, str(parts.hostname), port, target)


def quoted(url: str) -> str | None:
    """Return an http(s) URL or IRI with everything beside ASCII quoted and its host in IDNA; None where it is none.

    What is quoted stays as it is. A user and a password in it are left out: they are not ours to use.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        host = host if ":" in host else host.encode("idna").decode()
    except ValueError:  # UnicodeError is one
        return None
    # A bracket is part of no host, but IDNA makes one of a wide bracket.
    if parts.scheme not in ("http", "https") or not host or {*host} & {*"[]"} or any(map(_is_control, url.strip())):
        return None
    safe = "/%:@!$&'()*+,;=~-._"
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port else ""
    return urlunsplit((parts.scheme, place, quote(parts.path, safe), quote(parts.query, safe + "?"), ""))


def _is_control(character: str) -> bool:
    return ord(character) < 32 or ord(character) == 127


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3); None where it says none."""
    if not value:
        return None
    try:
        if value.strip().isdigit():
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


def opted_out(headers: http.client.HTTPMessage) -> bool:
    """Return whether a site's owner reserves an image from the training of models.

    By X-Robots-Tag (noai, noimageai, noindex, noimageindex, none; for all agents or for ours), TDM-Reservation: 1 (W3C's TDM
    Reservation Protocol), or Content-Usage with `n` for training (IETF's AI preferences, a draft).
    """
    if any(_is_reserved(value) for value in headers.get_all("X-Robots-Tag", [])):
        return True
    if (headers.get("TDM-Reservation") or "").strip() == "1":
        return True
    for value in headers.get_all("Content-Usage", []):
        for preference in value.split(","):
            use, _, answer = preference.partition("=")
            if use.strip().lower() in _USES and answer.strip().lower().startswith("n"):
                return True
    return False


def _is_reserved(robots: str) -> bool:
    """Return whether an X-Robots-Tag reserves the image: `noai`, `koala: noai`, but not `otherbot: noindex, noai`."""
    for_us = True
    for piece in robots.lower().split(","):
        name, colon, directive = (part.strip() for part in piece.partition(":"))
        if colon and name not in _WITH_VALUES:
            for_us = name in ("*", _TOKEN)  # and so are the directives after it, up to the next agent
        if for_us and (directive if colon else name) in _ROBOTS:
            return True
    return False


def _plain(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo a compression that was not asked for.

    Raises _FinalError where it gives more than `limit` bytes, or is none; _PassingError where it is cut off.
    """
    if (encoding or "identity").strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
    try:
        plain = decompressor.decompress(body, limit)
    except zlib.error:
        raise _FinalError("no HTTP") from None
    if decompressor.unconsumed_tail:
        raise _FinalError("too many bytes")
    if not decompressor.eof:
        raise _PassingError("cut off")
    return plain


def _utf_8(header: str) -> str:
    """Return a header's text where a server sent UTF-8: http.client takes it for Latin-1."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the network raises into a cause of a few words."""
    try:
        yield
    except AddressRefusedError:
        raise _FinalError("address refused") from None
    except socket.gaierror:
        raise _PassingError("unknown host") from None
    except ssl.SSLCertVerificationError:
        raise _FinalError("bad certificate") from None
    except TimeoutError:
        raise _PassingError("timed out") from None
    except ConnectionRefusedError:
        raise _PassingError("connection refused") from None
    except http.client.IncompleteRead:
        raise _PassingError("cut off") from None
    except http.client.RemoteDisconnected:
        raise _PassingError("cut off") from None
    except (http.client.HTTPException, ValueError):
        raise _FinalError("no HTTP") from None
    except OSError:
        raise _PassingError("connection lost") from None


def _version() -> str:
    try:
        return version("koala-distill")
    except PackageNotFoundError:
        return "0"
