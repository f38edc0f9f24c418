"""Which network addresses a URL of a foreign list may lead to: public ones.

A list can name `localhost`, a redirect can lead to a cloud's metadata, and a DNS name can point inside. So an address is checked
where the connection is made, and the connection goes to the address that was checked.
"""

import ipaddress
import math
import socket
import time
from collections.abc import Callable, Collection

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]
"""Host and port -> addresses."""

# Not for the internet, though Python's tables let some of them through: protocol assignments (RFC 6890), site-local (RFC 3879).
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "fec0::/10")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the IPv4 address is in the last 32 bits (RFC 6052)


class AddressRefusedError(OSError):
    """A URL leads to an address that is not public."""


def is_public(address: str) -> bool:
    """Return whether an IP address is globally reachable, and any IPv4 address inside it too.

    Not public: loopback, private, link-local (cloud metadata), shared (100.64.0.0/10), multicast, reserved and unspecified
    addresses.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return all(_is_global(each) for each in _inside(found))


def _is_global(address: Address) -> bool:
    if address.is_multicast or address.is_reserved or any(address in network for network in _SPECIAL):
        return False
    return address.is_global


def _inside(address: Address) -> list[Address]:
    """Return the addresses that a packet to `address` can reach: IPv6 carries IPv4 in several ways."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    if address.sixtofour:
        return [address, address.sixtofour]
    if address.teredo:
        return [address, *address.teredo]
    return [address]


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host. Raises OSError where there are none."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(
    host: str,
    port: int,
    timeout: float,
    deadline: float = math.inf,
    allowed: Collection[str] = (),
    resolver: Resolve = resolve,
) -> socket.socket:
    """Connect to a public address of a host.

    Args:
        host: Name or address.
        port: TCP port.
        timeout: Seconds for each attempt.
        deadline: When all attempts end, by time.monotonic().
        allowed: `HOST:PORT`s that may be inside.
        resolver: Gives the host's addresses. It is asked once, and the connection goes to what it answered.

    Raises:
        AddressRefusedError: The host has no public address.
        OSError: It does not answer.
    """
    addresses = resolver(host, port)
    if f"{host}:{port}" not in allowed:
        addresses = [address for address in addresses if is_public(address)]
    if not addresses:
        raise AddressRefusedError(f"{host} is not on the public internet")
    failure: OSError = OSError(f"{host} has no address")
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            return socket.create_connection((address, port), min(timeout, left))
        except OSError as error:
            failure = error
    raise failure
