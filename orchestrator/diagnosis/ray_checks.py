"""Ray: whether it is there, how it authenticates, and whether the cluster that is named answers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.diagnosis.findings import Check, Finding
from orchestrator.domain.errors import InfrastructureError
from orchestrator.logging import mask_secrets

AREA = "Ray"
IMPORT_SECONDS = 120.0
CLUSTER_SECONDS = 120.0
CONNECT_SECONDS = 5.0
MODES = ("token", "disabled")
TOKEN_FILE = Path(".ray/auth_token")


def ray_checks() -> list[Check]:
    """All checks of Ray; that of a cluster only where `RAY_ADDRESS` names one."""
    checks = [
        Check(AREA, "ray", ray_itself, IMPORT_SECONDS),
        Check(AREA, "authentication", lambda: authentication(os.environ, Path.home())),
    ]
    if address := os.environ.get("RAY_ADDRESS"):
        checks.append(Check(AREA, "cluster", partial(cluster, address), CLUSTER_SECONDS))
    return checks


async def ray_itself() -> Finding:
    """Whether Ray can be imported."""
    try:
        found = await _probe()
    except InfrastructureError as error:
        return Finding.broken(f"Ray cannot be imported: {error}", "install it again: make setup")
    return Finding.ok(f"Ray {found['version']}")


def authentication(environment: Mapping[str, str], home: Path) -> Finding:
    """Whether the mode is one that Ray knows, and a token is there where a named cluster wants one."""
    mode, address = environment.get("RAY_AUTH_MODE", ""), environment.get("RAY_ADDRESS", "")
    if mode not in MODES:
        return Finding.broken(
            f"RAY_AUTH_MODE={mode!r} is none of Ray's modes", f"set it to {' or '.join(MODES)}, or not at all"
        )
    if not address:
        secured = "with a token of its own" if mode == "token" else "without any token (RAY_AUTH_MODE)"
        return Finding.ok(f"a local cluster is started for each command, {secured}")
    if mode == "disabled":
        return Finding.ok("no token is sent to the cluster (RAY_AUTH_MODE=disabled)")
    token_file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / TOKEN_FILE)
    if environment.get("RAY_AUTH_TOKEN") or token_file.is_file():
        return Finding.ok("the cluster's token is there")
    return Finding.broken(
        f"RAY_AUTH_MODE=token, but there is no token in RAY_AUTH_TOKEN or {token_file}",
        "set RAY_AUTH_TOKEN to the cluster's token",
    )


async def cluster(address: str) -> Finding:
    """Whether the cluster of `RAY_ADDRESS` lets us in."""
    remedy = "check RAY_ADDRESS, the network and RAY_AUTH_MODE; without RAY_ADDRESS a local Ray is started"
    where = f"the cluster of RAY_ADDRESS={address}"
    try:
        await _connect(address)
        found = await _probe(address)
    except (OSError, TimeoutError) as error:
        return Finding.broken(f"{where} cannot be reached: {_in_words(error)}", remedy)
    except InfrastructureError as error:
        return Finding.broken(f"{where} does not let us in: {error}", remedy)
    gpus = f", {found['gpus']:g} GPUs" if found["gpus"] else ""
    nodes = "1 node" if found["nodes"] == 1 else f"{found['nodes']} nodes"
    return Finding.ok(f"{where}: {found['cpus']:g} CPUs{gpus} on {nodes}")


def _in_words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    # The text of a refused connection is Python's; that of an unknown host is the resolver's.
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


async def _connect(address: str) -> None:
    """Fail soon where nobody listens: Ray itself would try for long."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()


async def _probe(*arguments: str) -> dict[str, Any]:
    """What `ray_probe` prints; its process ends with us.

    Raises:
        InfrastructureError: it failed, with the last line that it wrote.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orchestrator.diagnosis.ray_probe", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        try:
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
            return found
        except (ValueError, IndexError):
            errors = b"it printed something else than was expected"
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    raise InfrastructureError(mask_secrets(lines[-1] if lines else f"exit code {process.returncode}"))
