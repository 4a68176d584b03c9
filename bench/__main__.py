"""`python -m bench`: every case against its reference, one table, and JSON of all rounds."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import path, rpc, telemetry
from bench.rounds import Case, table

GROUPS: dict[str, Callable[[int], list[Case]]] = {
    "rpc": rpc.measure,
    "path": path.measure,
    "telemetry": telemetry.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of each case; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    options = parser.parse_args(arguments)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"there is no group {', '.join(sorted(unknown))}")
    cases, began = [], time.monotonic()
    for group in options.groups or GROUPS:
        print(f"{group} ...", file=sys.stderr, flush=True)
        cases += GROUPS[group](options.rounds)
    print("\n".join(table(cases)))
    met = sum(case.is_met for case in cases)
    print(f"{met} of {len(cases)} targets met; {options.rounds} rounds, {time.monotonic() - began:.0f} s")
    if options.json is not None:
        about = {"python": platform.python_version(), "machine": platform.machine(), "cases": []}
        options.json.write_text(json.dumps(about | {"cases": [case.as_json() for case in cases]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
