"""`orchestrator submission pack`: packs, and says what is in the archive and what is not."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.adapters.artifacts.contents import Contents, LeftOut, survey, unpacked_bytes
from orchestrator.adapters.artifacts.pack import PackedArchive, write_archive
from orchestrator.adapters.artifacts.vendor import Target, collect_wheels
from orchestrator.commands.session import say
from orchestrator.domain.errors import UsageError
from orchestrator.settings import Settings
from orchestrator.submission.archive import ENTRY_POINTS
from orchestrator.submission.children import Children
from orchestrator.submission.requirements import REQUIREMENTS_FILE, WHEELS_DIRECTORY

VENDOR_SECONDS = 3600.0
BIG_FILE_BYTES = 100 * 2**20
SHOWN_PATHS = 8
LARGEST_FETCHED: int = Settings.model_fields["archive_max_bytes"].default


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack, and into which file."""

    directory: Path
    output: Path | None = None
    vendor: bool = False
    python_version: str | None = None
    platforms: tuple[str, ...] = ()


async def pack_command(request: PackRequest, *, as_json: bool, verbose: bool) -> int:
    """Pack, and print what came of it."""
    target = Target(request.python_version, request.platforms)
    if not (request.vendor or target.is_here):
        raise UsageError(
            "--python-version and --platform say for what --vendor collects wheels: add --vendor"
        )
    output = request.output or Path(f"{request.directory.resolve().name}.tar.gz")
    if output.is_dir():
        raise UsageError(f"{output} is a directory: --output names the archive itself")
    survey(request.directory, without=output)  # what cannot be packed is told before wheels are collected
    with tempfile.TemporaryDirectory(prefix="orchestrator-pack-") as scratch:
        wheels = (
            await _collected(request.directory, Path(scratch), target, verbose) if request.vendor else None
        )
        contents = survey(request.directory, without=output, wheels=wheels)
        packed = await asyncio.to_thread(write_archive, contents, output)
        report = _report(contents, packed, target if request.vendor else None)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report, contents)))
    sys.stdout.flush()
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    return 0


async def _collected(source: Path, scratch: Path, target: Target, verbose: bool) -> Path:
    say(f"collects the wheels of {source / REQUIREMENTS_FILE} for {target}")

    def show(line: str) -> None:
        if verbose:
            print(line, file=sys.stderr, flush=True)

    children = Children()
    try:
        return await asyncio.to_thread(
            collect_wheels, source, scratch, target, children=children, seconds=VENDOR_SECONDS, on_line=show
        )
    finally:
        await asyncio.to_thread(children.end_all)  # of an interrupted command, pip still runs


def _report(contents: Contents, packed: PackedArchive, target: Target | None) -> dict[str, Any]:
    wheels = {name: path for name, path in contents.files.items() if _is_wheel(name)}
    return {
        "path": str(packed.path),
        "size_bytes": packed.size_bytes,
        "sha256": packed.sha256,
        "files": len(contents.files),
        "unpacked_bytes": unpacked_bytes(contents),
        "entry_point": contents.entry_point,
        "wheels": [{"file": name, "size_bytes": path.stat().st_size} for name, path in wheels.items()],
        "wheels_for": None if target is None else str(target),
        "left_out": [asdict(each) for each in contents.left_out],
        "warnings": list(_warnings(contents, packed)),
    }


def _warnings(contents: Contents, packed: PackedArchive) -> Iterator[str]:
    if all(name in contents.files for name in ENTRY_POINTS):
        yield "there are agent.py and main.py: agent.py will be used, main.py will not be started"
    if REQUIREMENTS_FILE not in contents.files and any(map(_is_wheel, contents.files)):
        yield "there are wheels, but no requirements.txt: none of them will be installed"
    for name, path in contents.files.items():
        if (size := path.stat().st_size) >= BIG_FILE_BYTES:
            yield f"{name} is big: {readable_bytes(size)}"
    if packed.size_bytes > LARGEST_FETCHED:
        yield (
            f"the archive has {readable_bytes(packed.size_bytes)}; by default not more than "
            f"{readable_bytes(LARGEST_FETCHED)} are fetched (setting archive_max_bytes)"
        )


def _lines(report: dict[str, Any], contents: Contents) -> Iterator[str]:
    yield f"packed {report['path']}"
    yield f"  size         {readable_bytes(report['size_bytes'])} ({report['size_bytes']} bytes)"
    yield f"  sha256       {report['sha256']}"
    yield f"  files        {report['files']}, {readable_bytes(report['unpacked_bytes'])} when unpacked"
    yield f"  entry point  {report['entry_point']}"
    if report["wheels"]:
        yield f"wheels for {report['wheels_for']}:" if report["wheels_for"] else "wheels:"
        for wheel in report["wheels"]:
            yield f"  {Path(wheel['file']).name}  {readable_bytes(wheel['size_bytes'])}"
    if contents.left_out:
        yield "left out:"
        yield from left_out_lines(contents.left_out)


def left_out_lines(left_out: tuple[LeftOut, ...]) -> Iterator[str]:
    """A line for each reason, with the paths that it holds for."""
    paths: dict[str, list[str]] = {}
    for each in left_out:
        paths.setdefault(each.reason, []).append(each.path)
    for reason, names in paths.items():
        more = f" and {len(names) - SHOWN_PATHS} more" if len(names) > SHOWN_PATHS else ""
        yield f"  {', '.join(names[:SHOWN_PATHS])}{more}: {reason}"


def _is_wheel(name: str) -> bool:
    return name.startswith(f"{WHEELS_DIRECTORY}/") and name.endswith(".whl")


def readable_bytes(count: float) -> str:
    """A size for people, in units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
