"""Which process follows a job: told apart for good, so that its death is seen at once where it ran here."""

from __future__ import annotations

import json
import os

from orchestrator.adapters.process.places import this_machine
from orchestrator.adapters.process.processes import ProcessIdentity, started_at


def this_process() -> str:
    """A name of this very process, on this machine since its boot."""
    identity = started_at(os.getpid())
    return json.dumps({"machine": this_machine(), "pid": identity.pid, "started": identity.started})


def is_known_dead(name: str) -> bool:
    """Whether the process of that name has ended; False where that cannot be known from here."""
    try:
        data = json.loads(name)
        identity = ProcessIdentity(int(data["pid"]), int(data["started"]))
        return data["machine"] == this_machine() and not identity.alive
    except (ValueError, KeyError, TypeError):
        return False
