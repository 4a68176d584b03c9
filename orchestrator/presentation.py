"""What a person sees of results: tables on a terminal or in a pipe, and the bundle of files of `--output`.

Takes plain data: results as the messages say them, outcomes as the ledger holds them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.explanations import explanation, plain_text

PIPE_COLUMNS = 160
SUMMARY_COLUMNS = 110
NOTHING = "-"

STATUS_STYLES = {
    JobStatus.COMPLETED: "green",
    JobStatus.FAILED: "red",
    JobStatus.TIMEOUT: "yellow",
    JobStatus.CANCELLED: "yellow",
}

RESULTS_FILE = "result.json"
EPISODES_FILE = "episodes.jsonl"
SUMMARY_FILE = "summary.txt"


def make_console(stream: TextIO, *, columns: int | None = None) -> Console:
    """A console on `stream`: colours and the terminal's width on a terminal, wide plain text elsewhere."""
    if columns is None and not stream.isatty() and "COLUMNS" not in os.environ:
        columns = PIPE_COLUMNS
    return Console(file=stream, width=columns, highlight=False, markup=False, emoji=False)


# ------------------------------------------------------------------------------------------- tables


def results_table(results: Sequence[EvalResultMessage]) -> RenderableType:
    """For each result a heading, a row a task, a total line, and what went wrong, in words.

    Too narrow a terminal loses columns: mean steps first, then mean return, then the interval.
    """
    parts: list[RenderableType] = []
    for result in results:
        parts += [*([Text("")] if parts else []), _heading(result)]
        details = result.extra_data or {}
        if details.get("tasks"):
            parts.append(_TaskTable(details))
        parts += explanation(result)
    return Group(*parts)


def _heading(result: EvalResultMessage) -> Text:
    details = result.extra_data or {}
    heading = Text(style="bold")
    heading.append(f"job {result.job_id}  ")
    heading.append(plain_text(f"{result.env_provider}/{result.benchmark_name}"))
    heading.append("  ")
    heading.append(result.status.value, style=STATUS_STYLES.get(result.status, ""))
    if result.score is not None:
        score = (
            _percent(result.score) if details.get("score_name") == "success_rate" else _number(result.score)
        )
        heading.append(f"  score {score}")
    if details.get("missing_episodes"):
        heading.append(f"  {details['missing_episodes']} of {details['planned_episodes']} episodes missing")
    return heading


class _TaskTable:
    """One result's tasks; chooses its columns when it knows how wide it may be."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self._tasks: Sequence[Mapping[str, Any]] = details["tasks"]
        self._total: Mapping[str, Any] | None = details.get("overall")
        self._confidence: float = details.get("confidence", 0.95)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for hidden in (set(), {"steps"}, {"steps", "return"}, {"steps", "return", "interval"}):
            table = self._table(hidden)
            if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
                break
        yield table

    def _table(self, hidden: set[str]) -> Table:
        columns = [column for column in self._columns() if column.name not in hidden]
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, show_footer=self._total is not None, padding=(0, 1, 0, 0)
        )
        for column in columns:
            footer = plain_text(column.text(self._total)) if self._total is not None else ""
            table.add_column(
                column.title,
                footer=footer,
                justify="left" if column.name == "task" else "right",
                overflow="fold",
                no_wrap=column.name != "task",  # numbers that wrap cannot be compared by eye
            )
        for task in self._tasks:
            table.add_row(*(plain_text(column.text(task)) for column in columns))
        return table

    def _columns(self) -> Iterator[_Column]:
        yield _Column("task", "task")
        yield _Column("episodes", "episodes")
        yield _Column("success", "success")
        yield _Column("interval", f"{self._confidence * 100:g} % interval")
        yield _Column("return", "mean return")
        yield _Column("steps", "mean steps")
        yield _Column("faults", "faults")


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    title: str

    def text(self, summary: Mapping[str, Any]) -> str:
        match self.name:
            case "task":
                return str(summary.get("task_id", "total"))
            case "episodes":
                return str(summary["episodes"])
            case "success":
                return _percent(summary["success_rate"])
            case "interval":
                interval = summary["interval"]
                return NOTHING if interval is None else f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f}"
            case "return":
                return _number(summary["mean_return"])
            case "steps":
                return _number(summary["mean_steps"], digits=1)
            case _:
                return str(sum(summary["faults"].values()))


def _percent(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate * 100:.1f} %"


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if value and not 10**-digits <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


# ------------------------------------------------------------------------------------------- bundles


def results_json(results: Sequence[EvalResultMessage]) -> str:
    """One JSON document, `{"results": [...]}`; every key is there, what is unknown or not finite is null."""
    return json.dumps({"results": [json.loads(result.model_dump_json()) for result in results]}, indent=2)


def check_bundle_directory(directory: Path) -> None:
    """Return silently if a bundle can be written there; to be asked before hours of evaluation.

    Raises:
        UsageError: it is not a directory, or cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory} cannot hold the results: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"{directory} cannot hold the results: permission denied")


def write_bundle(
    directory: Path,
    results: Sequence[EvalResultMessage],
    outcomes: Mapping[int, Sequence[EpisodeOutcome]],
) -> list[Path]:
    """Write `summary.txt`, `episodes.jsonl` (a line an episode) and `result.json`; returns their paths.

    `outcomes` maps job ids to the outcomes of the job in plan order. Each file is replaced whole, and
    `result.json` last: who sees it new sees the others new as well.

    Raises:
        UsageError: the directory cannot be made or written.
    """
    check_bundle_directory(directory)
    summary = StringIO()
    make_console(summary, columns=SUMMARY_COLUMNS).print(results_table(results))
    files = {
        SUMMARY_FILE: "".join(line.rstrip() + "\n" for line in summary.getvalue().splitlines()),
        EPISODES_FILE: "".join(_episode_lines(outcomes)),
        RESULTS_FILE: results_json(results) + "\n",
    }
    for name, text in files.items():
        _replace(directory / name, text)
    return [directory / name for name in files]


def _episode_lines(outcomes: Mapping[int, Iterable[EpisodeOutcome]]) -> Iterator[str]:
    for job_id, episodes in outcomes.items():
        for outcome in episodes:
            yield json.dumps({"job_id": job_id, **episode_json(outcome)}) + "\n"


def episode_json(outcome: EpisodeOutcome) -> dict[str, Any]:
    """An episode as JSON takes it; a return that is not finite is null."""
    finite = math.isfinite(outcome.episode_return)
    return asdict(outcome) | {
        "started_at": outcome.started_at.isoformat(),
        "ended_at": outcome.ended_at.isoformat(),
        "episode_return": outcome.episode_return if finite else None,
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
