"""The fetcher against a real server with the faults of the real web."""

import email.utils
import gc
import gzip
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

from koala.data import addresses
from koala.data.fetch import FetchConfig, Fetcher, is_final, quoted, retry_after

IMAGE = bytes(range(256)) * 40
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: "Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        self.close_connection = True
        name = unquote(self.path).lstrip("/").partition("/")[0]
        self.server.answers[name](self)

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, body: bytes = IMAGE, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        named = {"Content_Type": "image/png"} | headers
        for name, value in named.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, chunks: Iterator[bytes]) -> None:
        """Send bytes slowly until the other side has had enough."""
        try:
            for chunk in chunks:
                self.wfile.write(chunk)
                time.sleep(0.05)
        except OSError:
            pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, Answer] = dict(ANSWERS)
        super().__init__((host, 0), Handler)
        self.place = f"{host}:{self.server_port}"
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_: Any) -> None:
        pass


def redirect(to: str) -> Answer:
    return lambda handler: handler.send(b"", 302, Location=to.format(place=handler.server.place))


def opted_out(**headers: str) -> Answer:
    return lambda handler: handler.send(**headers)


def raw(*pieces: bytes) -> Answer:
    def answer(handler: Handler) -> None:
        for piece in pieces:
            handler.wfile.write(piece)

    return answer


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/png")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * 10_000)
    except OSError:
        pass


def dripping_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.drip(iter(lambda: b"x", b""))


def dripping_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.drip(b"X-%d: y\r\n" % number for number in range(10**6))


def first_time(first: Answer, then: Answer) -> Answer:
    left = [first]
    return lambda handler: (left.pop() if left else then)(handler)


def good(handler: Handler) -> None:
    handler.send()


ANSWERS: dict[str, Answer] = {"good": good}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
# What the server does -> what comes of it, and how often it is asked with one retry. None: the image.
FAULTS: list[tuple[str, Answer, str | None, int]] = [
    ("good", good, None, 1),
    ("no length", raw(HEAD + b"\r\n", IMAGE), None, 1),
    ("chunked", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2800\r\n", IMAGE, b"\r\n0\r\n\r\n"), None, 1),
    ("octets", lambda handler: handler.send(Content_Type="application/octet-stream"), None, 1),
    ("a server's error once", first_time(lambda handler: handler.send(status=500), good), None, 2),
    ("cut off once", first_time(lambda handler: handler.send(length=99999), good), None, 2),
    ("redirect", redirect("/good/there"), None, 2),
    ("redirect with a host", redirect("http://{place}/good/there"), None, 2),
    *[
        (f"status {code}", lambda handler, code=code: handler.send(status=code), f"status {code}", 1)
        for code in (204, 400, 401, 402, 403, 404, 405, 410, 418, 451, 501)
    ],
    *[
        (f"status {code}", lambda handler, code=code: handler.send(status=code), f"status {code}", 2)
        for code in (408, 425, 429, 500, 502, 503, 504)
    ],
    ("a page", lambda handler: handler.send(Content_Type="text/html; charset=utf-8"), "a page, no image", 1),
    ("JSON", lambda handler: handler.send(b"{}", Content_Type="application/json"), "a page, no image", 1),
    ("cut off", lambda handler: handler.send(length=99999), "cut off", 2),
    ("cut off in a chunk", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2800\r\n", IMAGE[:100]), "cut off", 2),
    ("nothing", lambda handler: None, "cut off", 2),
    ("too long by its header", lambda handler: handler.send(b"", length=10**9), "too many bytes", 1),
    ("endless", endless, "too many bytes", 1),
    ("silent", lambda handler: time.sleep(1), "timed out", 2),
    ("a byte now and then", dripping_body, "deadline", 2),
    ("a header now and then", dripping_headers, "deadline", 2),
    ("no HTTP", raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "no HTTP", 1),
    ("a header without end", raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000), "no HTTP", 1),
    ("a length that is none", raw(HEAD + b"Content-Length: many\r\n\r\n", IMAGE), None, 1),
    ("in a circle", redirect("/in a circle/x"), "too many redirects", 6),
    ("to a file", redirect("file:///etc/passwd"), "no web address", 1),
    ("to ftp", redirect("ftp://example.com/a.png"), "no web address", 1),
    ("to broken brackets", redirect("http://[::1"), "no web address", 1),
    ("to no address in brackets", redirect("//[x]/a.png"), "no web address", 1),
    (
        "to a host with a slash",
        raw("HTTP/1.1 302 Found\r\nLocation: http://a\u2100b/\r\nContent-Length: 0\r\n\r\n".encode()),
        "no web address",
        1,
    ),
    (
        "a pause until no date",
        lambda handler: handler.send(status=503, Retry_After=f"Mon, 01 Jan 2024 00:00:00 +{'9' * 20}"),
        "status 503",
        2,
    ),
    ("to this machine", redirect("http://127.0.0.1:1/"), "address refused", 1),
    ("to localhost", redirect("http://localhost/x.png"), "address refused", 1),
    ("to metadata", redirect("http://169.254.169.254/latest/meta-data/"), "address refused", 1),
    ("to a private net", redirect("http://192.168.0.1/x.png"), "address refused", 1),
    ("to IPv6 of this machine", redirect("http://[::1]/x.png"), "address refused", 1),
    ("to NAT64 of this machine", redirect("http://[64:ff9b::7f00:1]/x.png"), "address refused", 1),
    ("noai", opted_out(X_Robots_Tag="noai"), "opted out of AI training", 1),
    ("noimageai", opted_out(X_Robots_Tag="max-image-preview: large, noimageai"), "opted out of AI training", 1),
    ("noindex", opted_out(X_Robots_Tag="NoIndex, nofollow"), "opted out of AI training", 1),
    ("none", opted_out(X_Robots_Tag="none"), "opted out of AI training", 1),
    ("noai for us", opted_out(X_Robots_Tag="koala: noai"), "opted out of AI training", 1),
    ("noai for another", opted_out(X_Robots_Tag="otherbot: noai"), None, 1),
    ("other directives", opted_out(X_Robots_Tag="nofollow, noarchive"), None, 1),
    ("noai for all", opted_out(X_Robots_Tag="*: noai"), "opted out of AI training", 1),
    (
        "noai for us among others",
        opted_out(X_Robots_Tag="otherbot: nofollow, koala: noai"),
        "opted out of AI training",
        1,
    ),
    ("two for another", opted_out(X_Robots_Tag="otherbot: noai, noindex"), None, 1),
    ("after a directive with a value", opted_out(X_Robots_Tag="max-snippet: 5, noai"), "opted out of AI training", 1),
    ("gzip", lambda handler: handler.send(gzip.compress(IMAGE), Content_Encoding="gzip"), None, 1),
    ("gzip cut off", lambda handler: handler.send(gzip.compress(IMAGE)[:100], Content_Encoding="gzip"), "cut off", 2),
    ("no gzip", lambda handler: handler.send(IMAGE, Content_Encoding="gzip"), "no HTTP", 1),
    (
        "a bomb",
        lambda handler: handler.send(gzip.compress(bytes(10**7)), Content_Encoding="gzip"),
        "too many bytes",
        1,
    ),
    (
        "redirect in UTF-8",
        raw("HTTP/1.1 302 Found\r\nLocation: /good/é\r\nContent-Length: 0\r\n\r\n".encode()),
        None,
        2,
    ),
    (
        "noai in a header of its own",
        raw(HEAD + b"X-Robots-Tag: nofollow\r\nX-Robots-Tag: noai\r\n\r\n", IMAGE),
        "opted out of AI training",
        1,
    ),
    ("TDM reserved", opted_out(TDM_Reservation="1"), "opted out of AI training", 1),
    ("TDM not reserved", opted_out(TDM_Reservation="0"), None, 1),
    ("usage: no training", opted_out(Content_Usage="train-ai=n"), "opted out of AI training", 1),
    ("usage: no AI", opted_out(Content_Usage="search=y, ai=n"), "opted out of AI training", 1),
    ("usage: yes", opted_out(Content_Usage="train-ai=y, search=n"), None, 1),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(Server()) as one:
        yield one


class running:  # noqa: N801
    def __init__(self, server: Server) -> None:
        self.server = server

    def __enter__(self) -> Server:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def fetcher(server: Server, **changes: Any) -> Fetcher:
    bounds = {"timeout": 0.4, "deadline": 1.0, "retries": 1, "max_bytes": 1_000_000} | changes
    return Fetcher(FetchConfig(**bounds), allow=(server.place,))


@pytest.mark.parametrize(("name", "answer", "cause", "times"), FAULTS, ids=[row[0] for row in FAULTS])
def test_what_comes_of_a_fault(server: Server, name: str, answer: Answer, cause: str | None, times: int) -> None:
    server.answers[name] = answer
    server.asked.clear()
    began = time.monotonic()
    found = fetcher(server).fetch(f"http://{server.place}/{name}/x.png")
    assert time.monotonic() - began < 5
    assert found == ((IMAGE, None) if cause is None else (None, cause))
    assert len(server.asked) == times


def test_redirects_share_one_deadline(server: Server) -> None:
    def slow(handler: Handler) -> None:
        time.sleep(0.3)
        redirect("/slow/x.png")(handler)

    server.answers["slow"] = slow  # six requests take longer than the deadline, each of them does not
    found = fetcher(server, timeout=5, retries=0).fetch(f"http://{server.place}/slow/x.png")
    assert found == (None, "deadline")


def test_the_deadline_holds_where_it_passes_before_there_is_a_connection(server: Server) -> None:
    server.answers["drops"] = dripping_body

    def slow(host: str, port: int) -> list[str]:
        time.sleep(0.6)
        return [host]

    one = Fetcher(FetchConfig(timeout=5, deadline=0.5, retries=0), (server.place,), slow)
    began = time.monotonic()
    assert one.fetch(f"http://{server.place}/drops/x.png") == (None, "deadline")
    assert time.monotonic() - began < 3


def test_a_host_that_nobody_asks_any_more_takes_no_memory() -> None:
    one = Fetcher(FetchConfig(retries=0), resolver=lambda *_: ["127.0.0.1"])
    one.fetch("http://first.example/x.png")
    tracemalloc.start()
    try:
        for number in range(500):
            assert one.fetch(f"http://{number}.example/x.png") == (None, "address refused")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()


# Who asks, and how.


def test_every_request_says_who_asks(server: Server) -> None:
    server.asked.clear()
    fetcher(server, contact="https://example.org/our-crawler").fetch(f"http://{server.place}/good/x.png")
    ((_, headers),) = server.asked
    assert headers["User-Agent"].startswith("koala/")
    assert headers["User-Agent"].endswith(" (+https://example.org/our-crawler)")
    assert headers["Host"] == server.place
    assert headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://a.example/x y/é.png", "http://a.example/x%20y/%C3%A9.png"),
        ("http://a.example/x%20y.png", "http://a.example/x%20y.png"),
        ("http://a.example/x?q=\u4f60 b&c=d%2Fe", "http://a.example/x?q=%E4%BD%A0%20b&c=d%2Fe"),
        ("http://b\u00fccher.example/x", "http://xn--bcher-kva.example/x"),
        ("HTTP://A.Example:80/x#part", "http://a.example:80/x"),
        ("http://user:secret@a.example/x", "http://a.example/x"),
        ("http://[2001:db8::1]:8080/x", "http://[2001:db8::1]:8080/x"),
        ("  http://a.example/x  ", "http://a.example/x"),
        ("http://a.example", "http://a.example"),
        ("ftp://a.example/x", None),
        ("file:///etc/passwd", None),
        ("data:image/png;base64,AAAA", None),
        ("javascript:alert(1)", None),
        ("//a.example/x", None),
        ("a.example/x", None),
        ("http://", None),
        ("http://a.example:99999/x", None),
        ("http://a.example:x/x", None),
        ("http://[::1/x", None),
        ("http://a.example/x\r\nHost: b.example", None),
        ("http://a..example/x", None),
        ("http://\uff3ba.example/x", None),
        (f"http://{'a' * 64}.example/x", None),
        ("", None),
    ],
)
def test_addresses_of_the_web_are_quoted_and_others_refused(url: str, sent: str | None) -> None:
    assert quoted(url) == sent
    if sent is None:
        assert Fetcher(FetchConfig()).fetch(url) == (None, "no web address")


def test_a_host_that_asks_for_a_pause_gets_it_from_all_threads(server: Server) -> None:
    """The second thread's URL has done nothing wrong: it waits too, since its host asked for it."""
    asked: list[float] = []
    server.answers["busy"] = first_time(
        lambda handler: handler.send(status=503, Retry_After="1"),
        lambda handler: (asked.append(time.monotonic()), good(handler)),
    )
    one, began = fetcher(server, deadline=10), time.monotonic()
    assert one.fetch(f"http://{server.place}/busy/x.png") == (IMAGE, None)
    assert asked[0] - began >= 1
    server.answers["busy"] = first_time(lambda handler: handler.send(status=429, Retry_After="1"), good)
    busy = threading.Thread(target=one.fetch, args=(f"http://{server.place}/busy/x.png",))
    busy.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert one.fetch(f"http://{server.place}/good/x.png") == (IMAGE, None)
    assert time.monotonic() - began > 0.5
    busy.join()


def test_a_long_pause_ends_the_attempts(server: Server) -> None:
    server.asked.clear()
    server.answers["closed"] = lambda handler: handler.send(status=429, Retry_After="86400")
    assert fetcher(server, retries=5).fetch(f"http://{server.place}/closed/x.png") == (None, "status 429")
    assert len(server.asked) == 1


def test_a_pause_is_a_number_or_a_date() -> None:
    assert retry_after("120") == 120
    assert retry_after(email.utils.formatdate(time.time() + 90, usegmt=True)) == pytest.approx(90, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after(value) for value in (None, "", "soon", "-1", "\u00b2")] == [None] * 5
    assert retry_after(f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT") is None


def test_no_other_sites_redirect_leads_to_a_server_of_ours(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 stands for the other site: the test calls it public."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.2")
    with running(Server(host="127.0.0.2")) as site:
        site.answers["bait"] = redirect(f"http://{server.place}/good/x.png")
        bait = f"http://{site.place}/bait/x.png"
        assert Fetcher(FetchConfig(retries=0), allow=(server.place,)).fetch(bait) == (None, "address refused")
        assert Fetcher(FetchConfig(retries=0), allow=(server.place, site.place)).fetch(bait) == (IMAGE, None)


def test_few_requests_to_a_host_at_a_time(server: Server) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def counted(handler: Handler) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        good(handler)

    server.answers["counted"] = counted
    one = fetcher(server, per_host=2, deadline=20, timeout=10)
    threads = [threading.Thread(target=one.fetch, args=(f"http://{server.place}/counted/{n}.png",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [2]


def test_nobody_listens(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one = Fetcher(FetchConfig(retries=0), allow=(f"127.0.0.1:{port}",))
    assert one.fetch(f"http://127.0.0.1:{port}/x.png") == (None, "connection refused")


def test_a_proxy_of_the_environment_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would connect in our place, to an address that nobody checked."""
    monkeypatch.setenv("http_proxy", f"http://{server.place}")
    server.asked.clear()
    assert Fetcher(FetchConfig(retries=0)).fetch("http://127.0.0.1:1/x.png") == (None, "address refused")
    assert server.asked == []


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a key and its certificate for 127.0.0.1, which nobody has signed but itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return str(file)


@pytest.fixture
def secure(certificate: str) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with running(Server(context)) as one:
        yield one


def test_a_certificate_that_nobody_vouches_for_is_refused(secure: Server) -> None:
    assert fetcher(secure).fetch(f"https://{secure.place}/good/x.png") == (None, "bad certificate")
    assert secure.asked == []


@pytest.mark.parametrize(("answer", "found"), [(good, (IMAGE, None)), (dripping_body, (None, "deadline"))])
def test_bounds_hold_under_tls(
    secure: Server, certificate: str, monkeypatch: pytest.MonkeyPatch, answer, found
) -> None:
    secure.answers["slow"] = answer
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: trusting)
    began = time.monotonic()
    assert fetcher(secure, retries=0).fetch(f"https://{secure.place}/slow/x.png") == found
    assert time.monotonic() - began < 5


def test_a_handshake_that_never_ends_is_ended(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = f"127.0.0.1:{mute.getsockname()[1]}"
        one = Fetcher(FetchConfig(timeout=30, deadline=0.5, retries=0), allow=(place,))
        began = time.monotonic()
        assert one.fetch(f"https://{place}/x.png") == (None, "deadline")
        assert time.monotonic() - began < 5


def test_final_is_what_another_day_would_give_too() -> None:
    final = ("status 404", "status 410", "status 403", "opted out of AI training", "a page, no image")
    passing = (
        "status 503",
        "status 429",
        "timed out",
        "too many bytes",
        "address refused",
        "bad certificate",
        "unheard of",
    )
    assert [cause for cause in (*final, *passing) if is_final(cause)] == list(final)
