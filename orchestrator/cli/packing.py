"""`submission pack`: one file that anybody can evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command()
@with_session
def pack(
    directory: Annotated[Path, typer.Argument(help="The submission, with agent.py or main.py.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The archive; by default DIRECTORY.tar.gz, here."),
    ] = None,
    vendor: Annotated[
        bool, typer.Option("--vendor", help="Collect the wheels of requirements.txt into the archive.")
    ] = False,
    python_version: Annotated[
        str | None, typer.Option(help="With --vendor: for another Python than this one, like 3.12.")
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option(
            help="With --vendor: for another platform, like manylinux_2_28_x86_64; several are tried in turn."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was packed as JSON on stdout.")] = False,
    *,
    session: Session,
) -> None:
    """Pack a submission; the same content gives the same bytes, wherever and whenever.

    Example: orchestrator submission pack my_policy --vendor
    """
    from orchestrator.commands.packing import PackRequest, pack_command

    request = PackRequest(directory, output, vendor, python_version, tuple(platform or ()))
    session.run(pack_command(request, as_json=as_json, verbose=session.debug))
