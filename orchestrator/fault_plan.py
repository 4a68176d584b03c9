"""What is to happen at failpoints, as rules: read from a text, decided by chance and by count."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from orchestrator.domain.errors import InfrastructureError, UsageError

Cut = Callable[[], None]

VARIABLE = "ORCHESTRATOR_FAILPOINTS"


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"  # SIGKILL of this process
    FREEZE = "freeze"  # SIGSTOP of this process: somebody has to thaw it
    RAISE = "raise"  # InfrastructureError
    DELAY = "delay"  # go on after so many seconds
    CUT = "cut"  # the connection is aborted, and the answer lost; `raise` where there is none


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens at the points whose name matches `pattern`; at most `times`, None without a limit."""

    pattern: str
    action: Action
    seconds: float = 0.0
    probability: float = 1.0
    times: int | None = None


_RULE = re.compile(
    r"(?P<action>[a-z]+)(?::(?P<seconds>[0-9.]+))?(?:@(?P<probability>[0-9.eE+-]+))?(?:\*(?P<times>\d+))?"
)


def parse(text: str, process: Callable[[], str] = lambda: "") -> FaultPlan:
    """The plan of a text like `seed=7; processes=job-*; ledger.commit.after=kill@0.1*1`.

    `process` tells what the process is called.

    Raises:
        UsageError: it is malformed.
    """
    rules: list[Rule] = []
    seed = "0"
    processes: tuple[str, ...] = ("*",)
    directory: Path | None = None
    for part in filter(None, (each.strip() for each in text.split(";"))):
        name, _, value = (each.strip() for each in part.partition("="))
        if name == "seed":
            seed = value
        elif name == "processes":
            processes = tuple(each.strip() for each in value.split(","))
        elif name == "dir":
            directory = Path(value)
        else:
            rules.append(_parsed_rule(name, value))
    return FaultPlan(rules, process, seed=seed, processes=processes, directory=directory)


def _parsed_rule(pattern: str, text: str) -> Rule:
    found = _RULE.fullmatch(text)
    try:
        if found is None or not pattern:
            raise ValueError("malformed")
        rule = Rule(
            pattern,
            Action(found["action"]),
            float(found["seconds"] or 0),
            float(found["probability"] or 1),
            None if found["times"] is None else int(found["times"]),
        )
    except ValueError:
        actions = ", ".join(Action)
        raise UsageError(
            f"{VARIABLE}: {pattern}={text} is no rule; PATTERN=ACTION[:SECONDS][@PROBABILITY][*TIMES], "
            f"where ACTION is one of {actions}"
        ) from None
    if (rule.action is Action.DELAY) != (rule.seconds > 0):
        raise UsageError(f"{VARIABLE}: delay, and nothing else, takes seconds: {pattern}={text}")
    return rule


class FaultPlan:
    """`Handler` by rules. The first rule that matches a point and is not used up decides about it.

    With a directory every fault leaves a file there before it happens, and `times` counts those of all
    processes together; else each process counts its own.
    """

    def __init__(
        self,
        rules: list[Rule],
        process: Callable[[], str],
        *,
        seed: str = "0",
        processes: tuple[str, ...] = ("*",),
        directory: Path | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.seed = seed
        self.processes = processes
        self._process = process
        self._directory = directory
        # With the process: a restarted one would else die at the same point again and again.
        self._random = random.Random(f"{seed}/{os.getpid()}")  # noqa: S311 - not for secrets
        self._lock = threading.Lock()
        self._fired = [0] * len(rules)
        self._used_up = [False] * len(rules)

    def reach(self, point: str, cut: Cut | None) -> None:
        rule = self._decide(point)
        if rule is not None:
            if rule.action is Action.DELAY:
                time.sleep(rule.seconds)
            else:
                _act(rule, point, cut)

    async def reach_async(self, point: str, cut: Cut | None) -> None:
        rule = self._decide(point)
        if rule is not None:
            if rule.action is Action.DELAY:
                await asyncio.sleep(rule.seconds)
            else:
                _act(rule, point, cut)

    def _decide(self, point: str) -> Rule | None:
        if not any(fnmatchcase(self._process(), pattern) for pattern in self.processes):
            return None
        with self._lock:
            for index, rule in enumerate(self.rules):
                if (
                    not self._used_up[index]
                    and fnmatchcase(point, rule.pattern)
                    and self._random.random() < rule.probability
                    and self._take(index, rule, point)
                ):
                    tell("failpoint", point=point, action=rule.action.value, process=self._process())
                    return rule
        return None

    def _take(self, index: int, rule: Rule, point: str) -> bool:
        """Count the fault, unless the rule is used up."""
        if self._directory is None:
            self._fired[index] += 1
            self._used_up[index] = rule.times is not None and self._fired[index] > rule.times
            return not self._used_up[index]
        note = {
            "point": point,
            "action": rule.action,
            "process": self._process(),
            "pid": os.getpid(),
            "at": time.time(),
        }
        numbers = range(rule.times) if rule.times is not None else iter(lambda: time.time_ns(), None)
        taken = any(_noted(self._directory / f"{index}-{number}.json", note) for number in numbers)
        self._used_up[index] = not taken
        return taken


def _noted(path: Path, note: Mapping[str, object]) -> bool:
    """Whether the file was not there yet: it is now, and whole before it has its name."""
    if path.exists():
        return False
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}")
    draft.write_text(json.dumps(note))
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def tell(event: str, **fields: object) -> None:
    """A line on standard error: by the log, which may not be set up yet, it could go to standard output."""
    print(json.dumps({"event": event, "level": "warning"} | fields), file=sys.stderr, flush=True)


def _act(rule: Rule, point: str, cut: Cut | None) -> None:
    if rule.action is Action.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif rule.action is Action.FREEZE:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rule.action is Action.CUT and cut is not None:
        cut()
    else:
        _fail(point)


def _fail(point: str) -> NoReturn:
    raise InfrastructureError(f"failpoint {point}")
