"""`orchestrator prune`: drop what nobody took, by the rules of the settings or stricter ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.adapters.postgres.retention import Pruned, Retention, RetentionRules
from orchestrator.app import retention_rules
from orchestrator.commands.session import ReadSettings, command_pool, say
from orchestrator.domain.errors import UsageError
from orchestrator.domain.messages import QUEUE_ADD_JOB, QUEUE_RESULT
from orchestrator.runtime import open_database
from orchestrator.settings import Settings

WORDS = {
    Pruned.STATUS_UPDATES: "queue job_status_update: messages that nobody consumed",
    Pruned.EPISODES: "queue episode_data: messages that nobody consumed",
    Pruned.STEPS: "queue episode_step_data: messages that nobody consumed",
    Pruned.HELD_JOBS: "queue add_job: held rows, which name no job that can run",
    Pruned.RESULTS: "queue eval_result: results that nobody consumed; the table results keeps them",
    Pruned.QUEUE_LOG: "the log of the queues",
    Pruned.EPISODE_PARTS: "staged steps of episode runs that were replaced",
    Pruned.ACTION_TRACES: "recorded actions of finished jobs, which cannot be replayed any more",
}
QUEUES = {
    **{what.value: what for what in (Pruned.STATUS_UPDATES, Pruned.EPISODES, Pruned.STEPS, Pruned.RESULTS)},
    QUEUE_ADD_JOB: Pruned.HELD_JOBS,
}


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What to drop, as asked for on the command line. Ages in seconds; None: as the settings say."""

    older_than_seconds: float | None = None
    results_older_than_seconds: float | None = None
    traces_older_than_seconds: float | None = None
    queue: str | None = None
    dry_run: bool = False


async def prune_command(read_settings: ReadSettings, request: PruneRequest, *, as_json: bool) -> int:
    """Drop it, and print how many rows went of each kind."""
    settings = read_settings()
    only = _only(request)
    rules = _rules(settings, request)
    say(
        f"drops what is older than {_in_words(rules.age_seconds)}, and of each queue "
        f"all but the newest {rules.rows_per_queue} rows"
    )
    async with open_database(settings) as database, command_pool(database) as pool:
        dropped = await Retention(pool).prune(rules, only=only, dry_run=request.dry_run)
    print(_as_json(dropped, request) if as_json else _as_table(dropped))
    rows = sum(dropped.values())
    counted = f"{rows} row{'' if rows == 1 else 's'}"
    say(f"would drop {counted}, and dropped none" if request.dry_run else f"dropped {counted}")
    return 0


def _only(request: PruneRequest) -> Pruned | None:
    """The kind of rows that `--queue` names.

    Raises:
        UsageError: there is no such queue, or its rows are never dropped unless asked for.
    """
    if request.queue is None:
        return None
    if request.queue not in QUEUES:
        raise UsageError(f"no queue is named {request.queue!r}: there are {', '.join(sorted(QUEUES))}")
    if request.queue == QUEUE_RESULT and request.results_older_than_seconds is None:
        raise UsageError(
            "results are never dropped from their queue by themselves: say --results-older-than, like 30d"
        )
    return QUEUES[request.queue]


def _rules(settings: Settings, request: PruneRequest) -> RetentionRules:
    kept = retention_rules(settings)
    return RetentionRules(
        age_seconds=request.older_than_seconds or kept.age_seconds,
        rows_per_queue=kept.rows_per_queue,
        results_age_seconds=request.results_older_than_seconds,
        traces_age_seconds=request.traces_older_than_seconds,
    )


def _in_words(seconds: float) -> str:
    """An age as a person says it: in the largest unit that it is a whole number of."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g} {unit if seconds > length else unit[:-1]}"
    return f"{seconds:g} {'second' if seconds == 1 else 'seconds'}"


def _as_json(dropped: Mapping[Pruned, int], request: PruneRequest) -> str:
    return json.dumps(
        {"dry_run": request.dry_run, "rows": {what.value: rows for what, rows in dropped.items()}}, indent=2
    )


def _as_table(dropped: Mapping[Pruned, int]) -> str:
    lines = ["      rows  from"]
    lines += [f"{rows:>10}  {WORDS[what]}" for what, rows in dropped.items()]
    return "\n".join(lines)
