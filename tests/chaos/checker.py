"""Whether a chaos run kept the promises: nothing lost, twice, stale, played again, or left over.

Pure: a history in, violations out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from tests.chaos.history import EpisodeRow, History, Received

# A play is noted by the submission, an end by the worker, a moment apart.
CLOCK_SECONDS = 0.05


def violations(history: History) -> list[str]:
    """One sentence for each broken promise; none where all were kept."""
    return [violation for check in CHECKS for violation in check(history)]


def every_acknowledged_job_has_one_result(history: History) -> Iterator[str]:
    results = Counter(each.job_id for each in _once(history.received) if each.queue == "eval_result")
    for job_id in sorted(history.acknowledged):
        status = history.statuses.get(job_id)
        if status is None:
            yield f"job {job_id} was acknowledged and is not in the database"
        elif status != "COMPLETED":
            yield f"job {job_id} ended {status}: {history.results.get(job_id, {}).get('error')}"
        if job_id not in history.results:
            yield f"job {job_id} has no result in the database"
        if results[job_id] != 1:
            yield f"job {job_id} has {results[job_id]} results in the queue"
    for job_id in sorted(results.keys() - history.acknowledged):
        yield f"job {job_id} has a result, and nobody enqueued it"


def the_results_are_those_of_the_database(history: History) -> Iterator[str]:
    for each in _once(history.received):
        if each.queue == "eval_result" and each.message != history.results.get(each.job_id):
            yield f"job {each.job_id}: the result in the queue is not the one in the database"


def each_episode_came_once(history: History) -> Iterator[str]:
    came = Counter(
        (each.job_id, each.message["task_id"], each.message["episode_id"])
        for each in _once(history.received)
        if each.queue == "episode_data"
    )
    for row in history.episodes:
        if came[row.key] != 1:
            yield f"{_name(row)} came {came[row.key]} times"
    for key in came.keys() - {row.key for row in history.episodes}:
        yield f"episode {key} came, and is in no plan"


def each_step_came_once(history: History) -> Iterator[str]:
    came = Counter(
        (each.job_id, each.message["task_id"], each.message["episode_id"], each.message["step"])
        for each in _once(history.received)
        if each.queue == "episode_step_data"
    )
    steps = Counter(key[:3] for key in came)
    for key, times in came.items():
        if times != 1:
            yield f"step {key} came {times} times"
    for row in history.episodes:
        if row.finished and steps[row.key] != row.steps:
            yield f"{_name(row)} has {row.steps} steps, and {steps[row.key]} came"


def no_write_was_stale(history: History) -> Iterator[str]:
    for write in history.writes:
        where = f"job {write.job_id}, episode {write.task_id}/{write.episode_id}"
        if write.epoch != write.current:
            yield f"{where}: {write.what} written with epoch {write.epoch} while {write.current} was current"
        if write.was_final:
            yield f"{where}: {write.what} written over a final one"


def outcomes_are_those_of_a_run_without_faults(history: History) -> Iterator[str]:
    faulty: Counter[int] = Counter()
    for row in history.episodes:
        if not row.finished:
            yield f"{_name(row)} has no outcome"
        elif row.fault is not None:
            faulty[row.job_id] += 1
        elif (row.episode_return, row.steps) != history.expected[row.key]:
            found = row.episode_return, row.steps
            yield f"{_name(row)} gave {found}, without faults {history.expected[row.key]}"
    for job_id, count in sorted(faulty.items()):
        done = history.done_to_submissions.get(job_id, 0)
        if count > done:
            yield f"job {job_id}: {count} episodes have a fault of the submission, to which {done} were done"


def no_finished_episode_was_played_again(history: History) -> Iterator[str]:
    ended = {(row.job_id, row.episode_id): row.ended_at for row in history.episodes if row.finished}
    for play in history.plays:
        end = ended.get((play.job_id, play.episode_id))
        if end is not None and play.at > end + CLOCK_SECONDS:
            late = play.at - end
            yield f"job {play.job_id}, episode {play.episode_id} began again {late:.2f} s after its end"


def nothing_is_left(history: History) -> Iterator[str]:
    yield from history.leftovers


CHECKS: tuple[Callable[[History], Iterator[str]], ...] = (
    every_acknowledged_job_has_one_result,
    the_results_are_those_of_the_database,
    each_episode_came_once,
    each_step_came_once,
    no_write_was_stale,
    outcomes_are_those_of_a_run_without_faults,
    no_finished_episode_was_played_again,
    nothing_is_left,
)


def _once(received: list[Received]) -> Iterator[Received]:
    """Each message of each row once: a row comes again to a consumer that could not acknowledge it."""
    yield from {(each.database, each.row, each.position): each for each in received}.values()


def _name(row: EpisodeRow) -> str:
    return f"job {row.job_id}, episode {row.task_id}/{row.episode_id}"
