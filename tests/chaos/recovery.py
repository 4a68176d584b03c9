"""How long it took until things went on after each fault."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.chaos.faults import Done
from tests.chaos.history import History
from tests.chaos.schedule import Kind
from tests.chaos.world import World

LIMIT_SECONDS = 120.0
POLL_SECONDS = 0.1

# What the promises say, where they say a number.
PROMISED = {
    Kind.KILL_WORKER: 20.0,
    Kind.KILL_POSTGRES: 10.0,
    Kind.CUT_API_SERVER: 30.0,
}
OF_A_JOB = frozenset(
    {
        Kind.KILL_SUPERVISOR,
        Kind.KILL_WORKER,
        Kind.KILL_SUBMISSION,
        Kind.FREEZE_SUPERVISOR,
        Kind.FREEZE_WORKER,
        Kind.FREEZE_SUBMISSION,
        Kind.EVICT_POD,
        Kind.RPC_RESET,
        Kind.RPC_HALF_CLOSE,
        Kind.RPC_STALL,
        Kind.RPC_LATENCY,
        Kind.RPC_SLICE,
    }
)
OF_THE_API = frozenset({Kind.KILL_REPLICA, Kind.FREEZE_REPLICA})
OF_OUTCOMES = frozenset({Kind.KILL_SINK, Kind.FREEZE_SINK, Kind.KILL_RAYLET})


@dataclass(frozen=True, slots=True)
class Recovery:
    """`seconds` from the end of a fault until things went on; None where nobody can tell."""

    kind: Kind
    seconds: float | None


async def watched(world: World, done: Done) -> Recovery | None:
    """The recovery from a fault that only shows while it happens; None where the rest of the run tells."""
    if done.fault.kind in OF_THE_API:
        return await _until(done, lambda: asyncio.to_thread(lambda: world.http_status("/healthz") == 200))
    if done.fault.kind in OF_A_JOB | OF_OUTCOMES:
        return None

    async def consumed() -> bool:
        """Whether both consumers went over all jobs since: they claim what waits then."""
        seen = [await installation.seen_at() for installation in world.installations]
        return min(seen) > done.over_at

    return await _until(done, consumed)


async def _until(done: Done, holds: Callable[[], Awaitable[bool]]) -> Recovery:
    while time.time() - done.over_at < LIMIT_SECONDS:
        if await holds():
            return Recovery(done.fault.kind, time.time() - done.over_at)
        await asyncio.sleep(POLL_SECONDS)
    return Recovery(done.fault.kind, LIMIT_SECONDS)


def told_by(history: History, dones: Sequence[Done]) -> list[Recovery]:
    """From a fault that hit a job until it began an episode, or ended; from others until an outcome came."""
    begun = defaultdict(list)
    for play in history.plays:
        begun[play.job_id].append(play.at)
    ended = {write.job_id: write.at for write in history.writes if write.what == "result"}
    outcomes = sorted(write.at for write in history.writes if write.what == "outcome")
    found = []
    for done in dones:
        if done.fault.kind in OF_A_JOB and done.job_id is not None:
            times = [*begun[done.job_id], *([ended[done.job_id]] if done.job_id in ended else [])]
        elif done.fault.kind in OF_OUTCOMES:
            times = outcomes
        else:
            continue
        later = [at for at in times if at >= done.over_at]
        found.append(Recovery(done.fault.kind, min(later) - done.over_at if later else None))
    return found


def table(recoveries: Sequence[Recovery]) -> list[str]:
    """One line for each kind of fault."""
    by_kind: dict[Kind, list[float]] = defaultdict(list)
    for each in recoveries:
        if each.seconds is not None:
            by_kind[each.kind].append(each.seconds)
    lines = [f"{'fault':<28}{'measured':>9}{'p50 s':>9}{'p99 s':>9}{'promised':>10}"]
    for kind in Kind:
        if values := sorted(by_kind[kind]):
            half, most = values[len(values) // 2], values[min(int(0.99 * len(values)), len(values) - 1)]
            promised = f"{PROMISED[kind]:g}" if kind in PROMISED else "-"
            lines.append(f"{kind:<28}{len(values):>9}{half:>9.2f}{most:>9.2f}{promised:>10}")
    return lines
