"""Which addresses are public, and where a connection goes."""

import socket
import time

import pytest

from koala.data.addresses import AddressRefusedError, connect, is_public

INSIDE = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",  # a cloud's metadata
    "100.64.0.1",  # shared address space
    "100.100.100.200",  # Alibaba's metadata
    "192.0.0.192",  # Oracle's metadata
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",  # AWS's metadata
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",  # NAT64 of 127.0.0.1
    "64:ff9b::a9fe:a9fe",  # NAT64 of 169.254.169.254
    "64:ff9b:1::1",
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2002:c0a8:101::1",  # 6to4 of 192.168.1.1
    "2001:0:7f00:1::",  # Teredo by a server at 127.0.0.1
    "no address",
    "",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.0.1", "2606:4700:4700::1111", "64:ff9b::101:101"]


@pytest.mark.parametrize("address", INSIDE)
def test_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost.", "2130706433", "0x7f000001", "127.1", "0"])
def test_every_way_to_write_this_machine_is_refused(host: str) -> None:
    with pytest.raises((AddressRefusedError, socket.gaierror)):
        connect(host, 80, 1)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_name_that_leads_inside_is_refused_and_one_that_is_allowed_is_not(listener: int) -> None:
    def inside(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with pytest.raises(AddressRefusedError, match=r"images\.example is not on the public internet"):
        connect("images.example", listener, 1, resolver=inside)
    with pytest.raises(AddressRefusedError):
        connect(
            "images.example", listener, 1, allowed=(f"other.example:{listener}", "images.example:1"), resolver=inside
        )
    connect("images.example", listener, 1, allowed=(f"images.example:{listener}",), resolver=inside).close()


def test_the_connection_goes_to_the_address_that_was_checked(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads outside when it is checked and inside afterwards (DNS rebinding): it is asked once."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    reached: list[tuple[str, int]] = []
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: reached.append(address))
    connect("images.example", listener, 1, resolver=lambda host, port: next(answers))
    assert reached == [("93.184.215.14", listener)]
    assert next(answers) == ["127.0.0.1"]


def test_of_mixed_answers_only_public_ones_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        tried.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ConnectionRefusedError):
        connect("mixed.example", 80, 1, resolver=lambda *_: ["10.0.0.1", "1.1.1.1", "::1", "8.8.8.8"])
    assert tried == ["1.1.1.1", "8.8.8.8"]


def test_many_addresses_that_do_not_answer_take_no_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(address: tuple[str, int], timeout: float) -> None:
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connect("slow.example", 80, 0.2, began + 0.5, resolver=lambda *_: ["8.8.8.8"] * 20)
    assert time.monotonic() - began < 2
