"""Runs a target many times in a process of its own, under a cap on its memory.

`python -m tests.fuzz.campaign decoder --executions 100000 --seed 7` prints one JSON object: how the
executions ended, how long they took and how much memory the process had. A finding ends it with exit code 1,
its input's number and the traceback; `--only NUMBER` plays that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target, make_target, without_chance

# Above what the process has after its imports. No input is above 64 KiB, or 300 KiB once it is repeated.
MEMORY_BYTES = 96 * 2**20
# For one execution; on a machine however busy, only an endless loop takes so long.
HANG_SECONDS = 120


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def _peak_kib() -> int:
    # Not ru_maxrss, which begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def cap_memory() -> None:
    cap = _address_space_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))


def _generator(seed: int, number: int) -> random.Random:
    return random.Random(seed << 32 | number)


def run(target: Target, seed: int, numbers: range) -> dict[str, object]:
    """Play the executions of these numbers; what was seen, as JSON takes it."""
    endings: Counter[str] = Counter()
    slowest_seconds = 0.0
    started_at = time.monotonic()
    try:
        for number in numbers:
            if number % 1000 == 0:
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
            before = time.perf_counter()
            try:
                endings[target.play(_generator(seed, number))] += 1
            except BaseException:
                print(f"finding: execution {number} of seed {seed}", file=sys.__stderr__)
                raise
            slowest_seconds = max(slowest_seconds, time.perf_counter() - before)
    finally:
        # Else it would end the process later, whatever that does by then.
        faulthandler.cancel_dump_traceback_later()
    return {
        "executions": len(numbers),
        "endings": dict(endings.most_common()),
        "seconds": round(time.monotonic() - started_at, 1),
        "slowest_seconds": round(slowest_seconds, 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution")
    parser.add_argument("--only", type=int, help="play this one execution again")
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)
    numbers = range(options.first, options.first + options.executions)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    with tempfile.TemporaryDirectory(prefix="orchestrator-fuzz-") as workdir, without_chance():
        target = make_target(options.target, Path(workdir))
        cap_memory()
        try:
            # The door and the policy server tell on stderr whom they refuse.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                seen = run(target, options.seed, numbers)
        except Exception:  # the finding
            traceback.print_exc()
            return 1
    seen["peak_kib"] = _peak_kib()
    print(json.dumps({"target": options.target, "seed": options.seed, **seen}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
