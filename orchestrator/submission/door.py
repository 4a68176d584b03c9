"""Accepts connections, a thread for each, and asks for the session key before anything else."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.submission.handshake import HandshakeFailed, prove_as_server, receive_message
from orchestrator.submission.transport import ByteStream, ConnectionLost
from orchestrator.submission.wire import WireError

DEFAULT_CONNECTIONS = 256
DEFAULT_GREETING_SECONDS = 10.0
KEEPALIVE_SECONDS = 60


class Door:
    """The accept loop of one listening socket.

    `welcome(stream, request, deadline)` runs in the connection's thread and owns the stream until it
    returns; `request` is None where there is no session key. `deadline` is what is left for the greeting.
    Above `connections` at once, a new one is closed at once; that is also the bound of threads.
    """

    def __init__(
        self,
        listener: socket.socket,
        session_key: bytes | None,
        welcome: Callable[[ByteStream, dict[str, Any] | None, float], None],
        *,
        connections: int = DEFAULT_CONNECTIONS,
        greeting_seconds: float = DEFAULT_GREETING_SECONDS,
    ) -> None:
        self._listener = listener
        self._session_key = session_key
        self._welcome = welcome
        self._places = threading.BoundedSemaphore(connections)
        self._greeting_seconds = greeting_seconds

    def open(self) -> None:
        """Accept from now on, in a thread that ends with the process or the listening socket."""
        self._listener.setblocking(True)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        said = ""
        while True:
            try:
                sock, _ = self._listener.accept()
                said = ""
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if self._listener.fileno() < 0:
                    return
                # Out of file descriptors, say: those of open connections come back.
                if said != (said := f"cannot accept a connection: {error}"):
                    print(said, file=sys.stderr, flush=True)
                time.sleep(0.1)
                continue
            if not self._places.acquire(blocking=False):
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
            except RuntimeError as error:  # no thread to be had
                print(f"cannot serve a connection: {error}", file=sys.stderr, flush=True)
                sock.close()
                self._places.release()

    def _serve(self, sock: socket.socket) -> None:
        try:
            stream = ByteStream(sock)
            stream.keep_alive(KEEPALIVE_SECONDS)
            deadline = time.monotonic() + self._greeting_seconds
            request = None
            if self._session_key is not None:
                prove_as_server(stream, self._session_key, deadline)
                request = receive_message(stream, deadline)
            self._welcome(stream, request, deadline)
        except (ConnectionLost, TimeoutError, OSError):
            pass  # the peer went away: nobody is left to be told
        except (HandshakeFailed, WireError) as error:
            print(f"a connection was refused: {error}", file=sys.stderr, flush=True)
        finally:
            sock.close()
            self._places.release()
