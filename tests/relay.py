"""A TCP relay on loopback that can refuse connections for a while, as a server that is down does."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_RESET = struct.pack("ii", 1, 0)  # close by a reset


class Relay:
    """Listens on `port`, and passes bytes to a server and back."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.refused = 0
        """Connections that were reset."""
        self._server = server
        self._seconds: float | None = None
        self._until = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self, seconds: float) -> None:
        """Reset the next connection, and all others for so many seconds from then on."""
        self._seconds = seconds

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                one = self._listener.accept()[0]
                if self._seconds is not None:
                    self._until, self._seconds = time.monotonic() + self._seconds, None
                if time.monotonic() < self._until:
                    self.refused += 1
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    one.close()
                    continue
                other = socket.create_connection(self._server)
                for source, to in ((one, other), (other, one)):
                    threading.Thread(target=_pass, args=(source, to), daemon=True).start()


def _pass(source: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            to.sendall(data)
    with suppress(OSError):
        to.shutdown(socket.SHUT_WR)


@contextmanager
def relay(server: tuple[str, int]) -> Iterator[Relay]:
    """Give a relay to `server`."""
    made = Relay(server)
    yield made
    made.close()
