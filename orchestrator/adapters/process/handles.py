"""Handles of process containers: JSON that names the machine, the directory and the shim."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import UUID

from orchestrator.adapters.process.places import this_machine
from orchestrator.adapters.process.processes import ProcessIdentity
from orchestrator.adapters.process.scratch import ContainerDirectory

BACKEND = "process"


@dataclass(frozen=True, slots=True)
class Handle:
    """Where a container is. `shim` is None where no shim had reported when the handle was made."""

    machine: str
    hostname: str
    directory: ContainerDirectory
    shim: ProcessIdentity | None

    @classmethod
    def here(cls, directory: ContainerDirectory) -> Handle:
        """The handle of a container of this machine."""
        processes = directory.read_processes()
        shim = None if processes is None else processes.shim
        return cls(this_machine(), socket.gethostname(), directory, shim)

    @property
    def is_here(self) -> bool:
        """Whether this machine, since this boot, is the one that runs the container."""
        return self.machine == this_machine()

    def encode(self) -> str:
        return json.dumps(
            {
                "backend": BACKEND,
                "machine": self.machine,
                "hostname": self.hostname,
                "directory": str(self.directory.root),
                "shim": None if self.shim is None else asdict(self.shim),
            }
        )

    @classmethod
    def decode(cls, text: str) -> Handle | None:
        """The handle that `encode` wrote; None for what is none of ours."""
        try:
            data = json.loads(text)
            if data["backend"] != BACKEND:
                return None
            root = Path(data["directory"])
            # Removal deletes this directory: only one that is named as we name them will do.
            UUID(root.name), UUID(root.parent.name)
            if not root.is_absolute():
                return None
            shim = None if data["shim"] is None else ProcessIdentity(**data["shim"])
            return cls(str(data["machine"]), str(data["hostname"]), ContainerDirectory(root), shim)
        except (ValueError, KeyError, TypeError):
            return None
