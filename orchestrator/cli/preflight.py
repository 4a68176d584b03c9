"""`preflight`: whether the cluster is fit for submissions."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command()
@with_session
def preflight(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    *,
    session: Session,
) -> None:
    """Look whether submissions can run in the Kubernetes cluster of the settings, isolated from all else.

    Runs two canary pods for some seconds, and removes them. Exits with 0 if submissions can run there, 3 if
    something is broken, or unsafe and not accepted. docs/preflight.md explains each line.

    Example: orchestrator preflight --set kubernetes_namespace=orchestrator-submissions
    """
    from orchestrator.cluster_containers import open_preflight_parts
    from orchestrator.commands.preflight import preflight_command

    session.run(preflight_command(session.settings, open_preflight_parts, as_json=as_json))
