"""An enforced NetworkPolicy in a pod of the double: its Python reaches nobody but the API server's gate.

That one the double closes by itself. Who connects to the pod gets through, as the policy admits it.
"""

import errno
import os
import socket
from typing import Any

GATE = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")


class PolicedSocket(socket.socket):
    """A socket that is refused by the network, as a policy that rejects does it."""

    def connect(self, address: Any) -> None:
        if code := self._refusal(address):
            raise ConnectionRefusedError(code, os.strerror(code))
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        return self._refusal(address) or super().connect_ex(address)

    def _refusal(self, address: Any) -> int:
        if isinstance(address, tuple) and (str(address[0]), str(address[1])) != GATE:
            return errno.ECONNREFUSED
        return 0


socket.socket = PolicedSocket  # type: ignore[misc]
