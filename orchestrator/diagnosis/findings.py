"""Checks and what they find. A check that fails or hangs is a finding itself, and holds up no other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from orchestrator.domain.errors import OrchestratorError
from orchestrator.logging import get_logger, mask_secrets

T = TypeVar("T")

log = get_logger()

DEADLINE_SECONDS = 10.0


class State(StrEnum):
    """How it stands with what was looked at."""

    OK = "ok"
    ATTENTION = "attention"  # works, or may do so, but a person should do something
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of an earlier run. `clear` (blocking) removes it, unless it is in use by then: False then."""

    what: str
    clear: Callable[[], bool] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw, and what a person can do about it; "" where nothing is to be done."""

    state: State
    what: str
    remedy: str = ""
    leftovers: tuple[Leftover, ...] = ()

    @classmethod
    def ok(cls, what: str) -> Finding:
        return cls(State.OK, what)

    @classmethod
    def attention(cls, what: str, remedy: str, leftovers: Iterable[Leftover] = ()) -> Finding:
        return cls(State.ATTENTION, what, remedy, tuple(leftovers))

    @classmethod
    def broken(cls, what: str, remedy: str) -> Finding:
        return cls(State.BROKEN, what, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. `look` may block: it gets a thread of its own; what it gives may be awaitable."""

    area: str
    name: str
    look: Callable[[], Finding | Awaitable[Finding]]
    deadline_seconds: float = DEADLINE_SECONDS


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A check's finding with its name."""

    area: str
    name: str
    finding: Finding


async def diagnose(checks: Iterable[Check]) -> list[Diagnosis]:
    """The findings of all checks, in their order; they run at once."""
    checks = list(checks)
    findings = await asyncio.gather(*(_finding(check) for check in checks))
    return [
        Diagnosis(check.area, check.name, finding) for check, finding in zip(checks, findings, strict=True)
    ]


async def _finding(check: Check) -> Finding:
    try:
        async with asyncio.timeout(check.deadline_seconds):
            found = await in_a_thread(check.look)
            return found if isinstance(found, Finding) else await found
    except TimeoutError:
        return Finding.broken(
            f"no answer within {check.deadline_seconds:g} s", "what it looks at hangs, or is very slow"
        )
    except OrchestratorError as error:
        return Finding.broken(mask_secrets(str(error)), "")
    except Exception as error:
        log.debug("check_failed", check=check.name, exc_info=True)
        text = f"could not be looked at: {type(error).__name__}: {error}"
        return Finding.broken(mask_secrets(text), "--debug shows where")


async def in_a_thread(call: Callable[[], T]) -> T:
    """What a blocking call gives. Unlike a pool's, its thread does not keep a process from ending."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(done: Future[T]) -> None:
        if answer.cancelled():
            return
        if (error := done.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(done.result())

    def work() -> None:
        done: Future[T] = Future()
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            done.set_exception(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, done)

    threading.Thread(target=work, name="check", daemon=True).start()
    return await answer
