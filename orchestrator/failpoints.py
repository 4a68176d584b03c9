"""Failpoints: where a test or a chaos run lets a process die, stop, wait, fail or lose a connection.

They stand on both sides of every statement, commit, queue acknowledgement, actor creation and outside call.
Nothing is armed unless the variable `ORCHESTRATOR_FAILPOINTS` says so, and nothing is wrapped then:
`instrumented` gives its argument back. How to arm them stands in docs/testing.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast

import structlog

from orchestrator.domain.errors import InfrastructureError, UsageError

log = structlog.get_logger(__name__)

T = TypeVar("T")
Cut = Callable[[], None]

VARIABLE = "ORCHESTRATOR_FAILPOINTS"


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"  # SIGKILL of this process
    FREEZE = "freeze"  # SIGSTOP of this process: somebody has to thaw it
    RAISE = "raise"  # InfrastructureError
    DELAY = "delay"  # go on after so many seconds
    CUT = "cut"  # the connection is aborted, and the answer lost; `raise` where there is none


class Handler(Protocol):
    """Decides what happens at a point. `cut` aborts its connection, if it has one, and raises."""

    def reach(self, point: str, cut: Cut | None) -> None: ...

    async def reach_async(self, point: str, cut: Cut | None) -> None: ...


# ---------------------------------------------------------------------------------------- the points

_handler: Handler | None = None
_process = ""


def is_armed() -> bool:
    """Whether anything can happen at a point of this process."""
    return _handler is not None


def reach(point: str, cut: Cut | None = None) -> None:
    """A point of blocking code.

    Raises:
        InfrastructureError: if the point is armed to.
    """
    if _handler is not None:
        _handler.reach(point, cut)


async def reach_async(point: str, cut: Cut | None = None) -> None:
    """A point of a coroutine.

    Raises:
        InfrastructureError: if the point is armed to.
    """
    if _handler is not None:
        await _handler.reach_async(point, cut)


def around(call: str) -> AbstractContextManager[None]:
    """The points `<call>.before` and, unless it raises, `<call>.after` of blocking code."""
    return _NOTHING if _handler is None else _around(call)


_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


@contextlib.contextmanager
def _around(call: str) -> Iterator[None]:
    reach(f"{call}.before")
    yield
    reach(f"{call}.after")


def instrumented(adapter: T, port: str, results: Mapping[str, str] | None = None) -> T:
    """`adapter` with points `<port>.<method>.before` and `.after`; itself while none is armed.

    What the methods of `results` return is instrumented too, under the port named there.
    """
    if _handler is None:
        return adapter
    return cast(T, Instrumented(adapter, port, results))


class Instrumented:
    """Stands for an adapter. Pickles with it, for a process that is armed as this one is."""

    def __init__(self, adapter: Any, port: str, results: Mapping[str, str] | None = None) -> None:
        self.__dict__.update(_adapter=adapter, _port=port, _results=dict(results or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        return instrumented, (self._adapter, self._port, self._results)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._adapter, name)
        defined = inspect.getattr_static(type(self._adapter), name, None)
        if name.startswith("_") or not inspect.isfunction(defined):
            return value  # a field or a property: nothing is asked of the outside
        return self._with_points(value, name)

    def _with_points(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        call = f"{self._port}.{name}"

        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def asynchronous(*arguments: Any, **named: Any) -> Any:
                await reach_async(f"{call}.before")
                answer = await method(*arguments, **named)
                await reach_async(f"{call}.after")
                return self._result(name, answer)

            return asynchronous

        @functools.wraps(method)
        def blocking(*arguments: Any, **named: Any) -> Any:
            reach(f"{call}.before")
            answer = method(*arguments, **named)
            reach(f"{call}.after")
            return self._result(name, answer)

        return blocking

    def _result(self, name: str, answer: Any) -> Any:
        port = self._results.get(name)
        return answer if port is None else instrumented(answer, port)


# ------------------------------------------------------------------------------------------- arming


@contextlib.contextmanager
def armed(handler: Handler) -> Iterator[None]:
    """This process armed with `handler` for the block. What is opened before is not instrumented."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def enter_process(name: str) -> None:
    """Say what this process is (`job-7`, `rollout-worker`): `processes=` of the variable selects by it."""
    global _process
    _process = name


def inherited() -> dict[str, str]:
    """The variables by which other processes are armed as this one is."""
    return {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {}


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


def parse(text: str) -> FaultPlan:
    """The plan of a text like `seed=7; processes=job-*; ledger.commit.after=kill@0.1*1`.

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
    return FaultPlan(rules, seed=seed, processes=processes, directory=directory)


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
        *,
        seed: str = "0",
        processes: tuple[str, ...] = ("*",),
        directory: Path | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.seed = seed
        self.processes = processes
        self._directory = directory
        # With the process: a restarted one would else die at the same point again and again.
        self._random = random.Random(f"{seed}/{os.getpid()}")  # noqa: S311 - not for secrets
        self._lock = threading.Lock()
        self._fired = [0] * len(rules)

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
        if not any(fnmatchcase(_process, pattern) for pattern in self.processes):
            return None
        with self._lock:
            for index, rule in enumerate(self.rules):
                if (
                    fnmatchcase(point, rule.pattern)
                    and self._random.random() < rule.probability
                    and self._take(index, rule, point)
                ):
                    log.warning("failpoint", point=point, action=rule.action.value, process=_process)
                    return rule
        return None

    def _take(self, index: int, rule: Rule, point: str) -> bool:
        """Count the fault, unless the rule is used up."""
        if self._directory is None:
            if rule.times is not None and self._fired[index] >= rule.times:
                return False
            self._fired[index] += 1
            return True
        note = {
            "point": point,
            "action": rule.action,
            "process": _process,
            "pid": os.getpid(),
            "at": time.time(),
        }
        numbers = range(rule.times) if rule.times is not None else iter(lambda: time.time_ns(), None)
        return any(_noted(self._directory / f"{index}-{number}.json", note) for number in numbers)


def _noted(path: Path, note: Mapping[str, object]) -> bool:
    """Whether the file was not there yet: it is now, and whole before it has its name."""
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}")
    draft.write_text(json.dumps(note))
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


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


if os.environ.get(VARIABLE):
    _handler = parse(os.environ[VARIABLE])
    log.warning("failpoints_armed", failpoints=os.environ[VARIABLE])
