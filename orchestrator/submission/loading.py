"""Loads a submission's class `Agent`, and shows its author what went wrong, without frames of ours."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

MAX_TRACEBACK_BYTES = 8 * 1024
MODULE_NAME = "agent"


class NotAnAgent(Exception):
    """The directory holds no usable class `Agent`; the text says why."""


def load_agent_class(directory: Path) -> Callable[[], Any]:
    """What makes one instance of the submission's `Agent`.

    `directory` becomes the working directory and the first place where modules are looked for, as if its
    `agent.py` had been run as a script there.

    Raises:
        NotAnAgent: there is no `agent.py`, or no class `Agent` with a method `act` in it.
        BaseException: whatever the submission's code raises.
    """
    path = directory / "agent.py"
    if not path.is_file():
        raise NotAnAgent("there is no file agent.py")
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    spec.loader.exec_module(module)
    agent_class = getattr(module, "Agent", None)
    if not isinstance(agent_class, type):
        raise NotAnAgent("agent.py has no class Agent")
    if not callable(getattr(agent_class, "act", None)):
        raise NotAnAgent("class Agent has no method act(self, observation)")
    return lambda: agent_class(**_arguments(agent_class))


def _arguments(agent_class: type) -> dict[str, None]:
    try:
        parameters = inspect.signature(agent_class).parameters
    except (TypeError, ValueError):  # made in C: it has no signature to read
        return {}
    return {name: None for name in ("observation_space", "action_space") if name in parameters}


def describe_exception(error: BaseException, directory: Path) -> str:
    """The traceback of `error` with the submission's own frames only, at most 8 KiB of UTF-8.

    Files are named as in the submission's directory: where that lies means nothing to its author.
    """
    if isinstance(error, NotAnAgent):
        return str(error)
    described = traceback.TracebackException.from_exception(error)
    _keep_frames_of(described, directory, set())
    return _shorten("".join(described.format()))


def _keep_frames_of(described: traceback.TracebackException, directory: Path, seen: set[int]) -> None:
    if id(described) in seen:
        return
    seen.add(id(described))
    described.stack = _own_frames(described.stack, directory)
    if isinstance(name := getattr(described, "filename", None), str) and _is_of(name, directory):
        described.filename = str(Path(name).relative_to(directory))  # of a SyntaxError
    related = [described.__cause__, described.__context__, *(getattr(described, "exceptions", None) or ())]
    for other in related:
        if other is not None:
            _keep_frames_of(other, directory, seen)


def _own_frames(stack: traceback.StackSummary, directory: Path) -> traceback.StackSummary:
    own = [frame for frame in stack if _is_of(frame.filename, directory)]
    for frame in own:
        frame.line  # noqa: B018 - reads the source line, which the shorter name would not lead to
        frame.filename = str(Path(frame.filename).relative_to(directory))
    return traceback.StackSummary.from_list(own)


def _is_of(filename: str, directory: Path) -> bool:
    return Path(filename).is_relative_to(directory)


def describe_frame(frame: FrameType | None, directory: Path) -> str:
    """Where in the submission a thread stands now; "" when it is not in its code."""
    return _shorten("".join(_own_frames(traceback.extract_stack(frame), directory).format()))


def _shorten(text: str) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_TRACEBACK_BYTES:
        return text
    # The end names the exception, the beginning where it all began.
    half = MAX_TRACEBACK_BYTES // 2 - 16
    head, tail = encoded[:half].decode("utf-8", "ignore"), encoded[-half:].decode("utf-8", "ignore")
    return f"{head}\n  [...]\n{tail}"
