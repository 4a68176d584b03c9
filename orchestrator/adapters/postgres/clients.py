"""Who of us connects to Postgres: by what name, and with how many connections at most."""

from __future__ import annotations

CONSUMER_APPLICATION = "orchestrator consumer"

CONSUMER_CONNECTIONS = 8
SINK_CONNECTIONS = 4
SUPERVISOR_CONNECTIONS = 4
COMMAND_CONNECTIONS = 2


def connections_needed(max_concurrent_jobs: int) -> int:
    """Those of a control plane with all its places taken, and of one command beside it."""
    control_plane = CONSUMER_CONNECTIONS + SINK_CONNECTIONS + max_concurrent_jobs * SUPERVISOR_CONNECTIONS
    return control_plane + COMMAND_CONNECTIONS
