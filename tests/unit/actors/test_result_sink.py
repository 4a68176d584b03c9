from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.actors.result_sink import ResultSink, SinkIsFull, SinkRefused
from orchestrator.adapters.postgres.fence import exclusively
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError
from tests.job_fixtures import a_store, claimed, finished, planned_runs

if TYPE_CHECKING:
    from tests.conftest import Pool

pytestmark = pytest.mark.usefixtures("unrendered_log")

COMMITTED, ALREADY = CommitOutcome.COMMITTED, CommitOutcome.ALREADY


@dataclass
class GatedLedger:
    """The real ledger behind a gate, with a note of what came through it."""

    ledger: PostgresLedger
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[int] = field(default_factory=list)

    async def commit(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        await self._pass()
        self.batches.append(len(episodes))
        return await self.ledger.commit(episodes)

    async def stage_part(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        await self._pass()
        return await self.ledger.stage_part(run, part, messages)

    async def _pass(self) -> None:
        self.arrived.set()
        await self.gate.wait()


def a_sink(ledger: Any, **limits: Any) -> ResultSink:
    defaults = {"max_bytes": 2**20, "batch_episodes": 100, "database_patience_seconds": 10.0}
    return ResultSink(ledger=ledger, **defaults | limits)


@asynccontextmanager
async def working(sink: ResultSink) -> AsyncIterator[asyncio.Task[None]]:
    work = asyncio.create_task(sink.work())
    try:
        yield work
    finally:
        await cancelled(work)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def started(*calls: Any) -> list[asyncio.Task[Any]]:
    """The calls as tasks that have run until they wait."""
    tasks = [asyncio.create_task(call) for call in calls]
    for _ in range(10):
        await asyncio.sleep(0)
    return tasks


async def some_runs(pool: Pool, count: int) -> list[EpisodeRun]:
    return await planned_runs(pool, await claimed(a_store(pool)), episodes=count)


async def finished_in_ledger(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM episodes WHERE finished"))


async def test_what_waits_goes_into_one_transaction_and_each_sender_gets_its_own_outcomes(pool: Pool) -> None:
    runs = await some_runs(pool, 4)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger)

    async with working(sink):
        first = await started(sink.commit([finished(runs[0])]))
        await ledger.arrived.wait()
        others = await started(
            sink.commit([finished(runs[1]), finished(runs[2])]), sink.commit([finished(runs[0])])
        )
        ledger.gate.set()
        outcomes = await asyncio.gather(*first, *others)

    assert outcomes == [[COMMITTED], [COMMITTED, COMMITTED], [ALREADY]]
    assert ledger.batches == [1, 3]
    assert sink.committed == await finished_in_ledger(pool) == 3


async def test_a_transaction_takes_no_more_episodes_than_the_cap(pool: Pool) -> None:
    runs = await some_runs(pool, 4)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger, batch_episodes=2)

    async with working(sink):
        tasks = await started(*(sink.commit([finished(run)]) for run in runs))
        ledger.gate.set()
        await asyncio.gather(*tasks)

    assert sum(ledger.batches) == 4
    assert max(ledger.batches) <= 2


@pytest.mark.parametrize("holder", ["episode", "part"])
async def test_a_full_sink_makes_workers_wait_whatever_it_is_full_of(pool: Pool, holder: str) -> None:
    runs = await some_runs(pool, 2)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger, max_bytes=100)
    big = replace(finished(runs[0]), step_messages=(b"{}" * 60,))

    async with working(sink):
        holding = sink.commit([big]) if holder == "episode" else sink.stage(runs[0], 0, [b"{}" * 60])
        (held,) = await started(holding)
        await ledger.arrived.wait()
        sink.database_patience_seconds = 0.1
        with pytest.raises(SinkIsFull):
            await sink.commit([finished(runs[1])])
        with pytest.raises(SinkIsFull):
            await sink.stage(runs[1], 0, [b"{}"])
        await cancelled(held)


async def test_room_comes_free_when_a_part_is_stored(pool: Pool) -> None:
    runs = await some_runs(pool, 2)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger, max_bytes=100)

    async with working(sink):
        (staging,) = await started(sink.stage(runs[0], 0, [b"{}" * 60]))
        waiting = await started(sink.commit([finished(runs[1])]), sink.stage(runs[0], 1, [b"{}" * 60]))
        ledger.gate.set()
        outcomes = await asyncio.gather(staging, *waiting)

    assert outcomes == [True, [COMMITTED], True]


async def test_what_has_no_room_is_not_fetched_before_it_has(pool: Pool) -> None:
    runs = await some_runs(pool, 2)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger, max_bytes=100)
    fetched: list[int] = []

    def fetching(number: int) -> Any:
        async def fetch() -> list[FinishedEpisode]:
            fetched.append(number)
            return [finished(runs[number])]

        return fetch

    async with working(sink):
        tasks = await started(*(sink.commit_fetched(80, fetching(number)) for number in range(2)))
        await ledger.arrived.wait()
        before = list(fetched)
        ledger.gate.set()
        outcomes = await asyncio.gather(*tasks)

    assert (before, fetched) == ([0], [0, 1])
    assert outcomes == [[COMMITTED], [COMMITTED]]


@pytest.mark.parametrize("fails_while", ["it is fetched", "it waits in line", "it is staged"])
async def test_what_nobody_waits_for_any_more_takes_no_room(pool: Pool, fails_while: str) -> None:
    runs = await some_runs(pool, 3)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger, max_bytes=2**10, answer_seconds=0.2)

    async def never() -> list[FinishedEpisode]:
        return await asyncio.get_running_loop().create_future()

    async with working(sink):
        in_hand = await started(sink.commit([finished(runs[0])]))
        await ledger.arrived.wait()
        calls = {
            "it is fetched": lambda: sink.commit_fetched(2**9, never),
            "it waits in line": lambda: sink.commit([finished(runs[1])]),
            "it is staged": lambda: sink.stage(runs[1], 0, [b"{}"]),
        }
        with pytest.raises(InfrastructureError, match="send again"):
            await calls[fails_while]()
        sink.answer_seconds = 10.0
        ledger.gate.set()
        await asyncio.gather(*in_hand, return_exceptions=True)
        largest = await sink.commit_fetched(2**10, lambda: _soon([finished(runs[2])]))

    assert largest == [COMMITTED]
    assert sink.held_bytes == 0
    assert await finished_in_ledger(pool) == 2


async def _soon(episodes: list[FinishedEpisode]) -> list[FinishedEpisode]:
    return episodes


async def test_one_bad_episode_does_not_hold_up_the_others(pool: Pool) -> None:
    runs = await some_runs(pool, 3)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger)
    bad = replace(finished(runs[1]), steps=2**40)  # no integer column takes that

    async with working(sink):
        tasks = await started(*(sink.commit([each]) for each in (finished(runs[0]), bad, finished(runs[2]))))
        ledger.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert (outcomes[0], outcomes[2]) == ([COMMITTED], [COMMITTED])
    assert isinstance(outcomes[1], SinkRefused)


async def test_a_lock_that_is_not_given_in_time_is_no_refusal(database: Database, pool: Pool) -> None:
    (run,) = await some_runs(pool, 1)

    async with open_pool(database, application_name="sink", lease_seconds=1.0) as impatient:
        sink = a_sink(PostgresLedger(impatient), database_patience_seconds=0.5)
        async with working(sink), exclusively(pool, run.job_id):
            with pytest.raises(InfrastructureError):
                await sink.commit([finished(run)])
            with pytest.raises(InfrastructureError):
                await sink.stage(run, 0, [b"{}"])


async def test_a_closed_pool_is_told_to_those_who_wait(database: Database, pool: Pool) -> None:
    (run,) = await some_runs(pool, 1)
    async with open_pool(database, application_name="sink") as short_lived:
        sink = a_sink(PostgresLedger(short_lived))

    async with working(sink):
        with pytest.raises(InfrastructureError, match="pool is closed"):
            await sink.commit([finished(run)])


async def test_a_sink_that_ends_leaves_nobody_waiting(pool: Pool) -> None:
    runs = await some_runs(pool, 3)
    ledger = GatedLedger(PostgresLedger(pool))
    sink = a_sink(ledger, batch_episodes=1)

    async with working(sink) as work:
        in_hand = await started(sink.commit([finished(runs[0])]))
        await ledger.arrived.wait()
        in_line = await started(sink.commit([finished(runs[1])]))
        await cancelled(work)
        answers = await asyncio.wait_for(asyncio.gather(*in_hand, *in_line, return_exceptions=True), 5)
        with pytest.raises(InfrastructureError, match="closed"):
            await sink.commit([finished(runs[2])])

    assert [type(answer) for answer in answers] == [InfrastructureError, InfrastructureError]
    assert await finished_in_ledger(pool) == 0


@pytest.mark.parametrize(
    ("error", "answer"),
    [(RuntimeError("no loop"), InfrastructureError), (ValueError("a bug"), SinkRefused)],
)
async def test_an_unforeseen_error_says_whether_to_send_again_and_the_sink_goes_on(
    pool: Pool, error: Exception, answer: type[Exception]
) -> None:
    (run,) = await some_runs(pool, 1)
    ledger = FailingLedger(PostgresLedger(pool), [error])
    sink = a_sink(ledger)

    async with working(sink):
        with pytest.raises(answer) as refused:
            await sink.commit([finished(run)])
        again = await sink.commit([finished(run)])

    assert type(refused.value) is answer
    assert again == [COMMITTED]


@dataclass
class FailingLedger:
    """The real ledger, after some errors."""

    ledger: PostgresLedger
    errors: list[Exception]

    async def commit(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        if self.errors:
            raise self.errors.pop()
        return await self.ledger.commit(episodes)
