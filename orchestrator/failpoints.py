"""Failpoints: where a test or a chaos run lets a process die, stop, wait, fail or lose a connection.

They stand on both sides of every statement, commit, queue acknowledgement, actor creation and outside call.
Nothing is armed unless the variable `ORCHESTRATOR_FAILPOINTS` says so, and nothing is wrapped then:
`instrumented` gives its argument back. How to arm them stands in docs/testing.md.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, cast

from orchestrator.fault_plan import VARIABLE, Cut, parse, tell

T = TypeVar("T")


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


if os.environ.get(VARIABLE):
    _handler = parse(os.environ[VARIABLE], lambda: _process)
    tell("failpoints_armed", failpoints=os.environ[VARIABLE])
