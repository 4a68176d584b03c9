"""What a chaos run does, and when: a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """A fault: what is done, and to what."""

    KILL_CONSUMER = "kill consumer"
    KILL_SUPERVISOR = "kill supervisor"
    KILL_WORKER = "kill worker"
    KILL_SINK = "kill sink"
    KILL_REPLICA = "kill Serve replica"
    KILL_COMMAND = "kill `orchestrator up`"
    KILL_SUBMISSION = "kill submission"
    KILL_RAYLET = "kill raylet"
    KILL_GCS = "kill GCS"
    KILL_POSTGRES = "kill Postgres"
    FREEZE_CONSUMER = "freeze consumer"
    FREEZE_SUPERVISOR = "freeze supervisor"
    FREEZE_WORKER = "freeze worker"
    FREEZE_SINK = "freeze sink"
    FREEZE_REPLICA = "freeze Serve replica"
    FREEZE_SUBMISSION = "freeze submission"
    FREEZE_POSTGRES = "freeze Postgres"
    CUT_DATABASE = "end every database session"
    CUT_API_SERVER = "API server away"
    EVICT_POD = "evict pod"
    RPC_RESET = "reset RPC connection"
    RPC_HALF_CLOSE = "half-close RPC connection"
    RPC_STALL = "stall RPC connection"
    RPC_LATENCY = "delay RPC connection"
    RPC_SLICE = "slice RPC connection"


# Longer than a lease of the run, or shorter: what thaws finds its place taken, or not.
FREEZE_SECONDS = (1.0, 3.0, 12.0)
# A submission that stands still for longer than a step may take would be at fault.
SHORT_SECONDS = (0.5, 1.0, 3.0)
_LONG = frozenset(
    {Kind.FREEZE_CONSUMER, Kind.FREEZE_SUPERVISOR, Kind.FREEZE_WORKER, Kind.FREEZE_SINK, Kind.FREEZE_POSTGRES}
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of a schedule. `pick`, from 0 to below 1, chooses among the victims that there are then."""

    number: int
    at_seconds: float
    kind: Kind
    pick: float
    seconds: float  # how long it lasts, for a fault that passes


def schedule(seed: int, count: int, gap_seconds: float, kinds: Sequence[Kind] = tuple(Kind)) -> list[Fault]:
    """`count` faults, `gap_seconds` apart on average; no kind comes twice more often than another."""
    chance = random.Random(seed)
    faults, at_seconds = [], 0.0
    for number, kind in zip(range(1, count + 1), _kinds(chance, kinds), strict=False):
        at_seconds += gap_seconds * chance.uniform(0.5, 1.5)
        lasting = FREEZE_SECONDS if kind in _LONG else SHORT_SECONDS
        faults.append(Fault(number, at_seconds, kind, chance.random(), chance.choice(lasting)))
    return faults


def _kinds(chance: random.Random, kinds: Sequence[Kind]) -> Iterator[Kind]:
    while True:
        yield from chance.sample(kinds, len(kinds))
