"""What went wrong in a job, as lines for people: what a table of numbers cannot say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.logging import escape_control_characters

MAX_TASKS_WITH_FAULTS = 20


def plain_text(text: str, style: str = "") -> Text:
    """Text of a stranger, with nothing in it that a terminal obeys."""
    return Text(escape_control_characters(text), style=style)


def explanation(result: EvalResultMessage) -> Iterator[RenderableType]:
    """Faults by task, the first of each class in words, clipped actions, and why the job failed if it did."""
    details = result.extra_data or {}
    yield from _fault_lines(details.get("tasks") or ())
    for example in details.get("fault_examples") or ():
        yield from _example(example)
    yield from _clipped(details.get("overall") or {})
    if result.error:
        yield plain_text(result.error.rstrip(), style="red")
    log = _unsaid(result.logs or "", result.error or "")
    if log and result.status is JobStatus.FAILED:
        yield Text("the end of the submission's log:", style="dim")
        yield plain_text(log, style="dim")


def _fault_lines(tasks: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    faulted = [task for task in tasks if task["faults"]]
    for task in faulted[:MAX_TASKS_WITH_FAULTS]:
        classes = ", ".join(f"{count} {name}" for name, count in task["faults"].items())
        yield plain_text(f"faults of {task['task_id']}: {classes}", style="yellow")
    if len(faulted) > MAX_TASKS_WITH_FAULTS:
        yield plain_text(f"and faults of {len(faulted) - MAX_TASKS_WITH_FAULTS} more tasks", style="yellow")


def _example(example: Mapping[str, Any]) -> Iterator[RenderableType]:
    place = f"episode {example['episode_id']} of {example['task_id']}"
    yield plain_text(f"the first {example['fault']}, in {place}:", style="yellow")
    yield Padding(plain_text(example["detail"].rstrip() or "no details"), (0, 0, 0, 2), expand=False)


def _clipped(overall: Mapping[str, Any]) -> Iterator[Text]:
    actions, episodes = overall.get("clipped_actions"), overall.get("clipped_episodes")
    if actions:
        counted = "1 action out of bounds was" if actions == 1 else f"{actions} actions out of bounds were"
        yield plain_text(
            f"{counted} clipped, in {episodes} of {overall['episodes']} episodes", style="yellow"
        )


def _unsaid(log: str, error: str) -> str:
    """The part of the log that the error has not said already."""
    before, _, after = log.partition(error.strip()) if error.strip() else (log, "", "")
    return "\n".join(part.strip("\n") for part in (before, after) if part.strip())
