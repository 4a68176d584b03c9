"""Job messages that can never run: what their sender gets, what an operator sees, and that nobody waits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.adapters.postgres.held_rows import held_rows
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import QUEUE_ADD_JOB, QUEUE_RESULT, EvalJobMessage
from tests.golden_texts import check_golden
from tests.job_fixtures import a_job, a_store
from tests.unit.actors.control_fakes import FakeSupervisors, consuming, eventually

if TYPE_CHECKING:
    from tests.conftest import Pool

pytestmark = pytest.mark.usefixtures("unrendered_log")

JOB = {
    "env_provider": "gymnasium",
    "benchmark_name": "CartPole-v1",
    "miner_hotkey": "5Fminer",
    "competition_id": "autumn",
}


def job(**fields: Any) -> bytes:
    return json.dumps(JOB | fields).encode()


def raw(fields: str, **more: Any) -> bytes:
    """A job with fields that Python's JSON would not write."""
    return job(**more)[:-1] + b", " + fields.encode() + b"}"


# Those that name a job: it is FAILED, and its sender gets a result.
FAILED: dict[str, dict[str, Any] | str] = {
    "missing_fields": '"x": 1',
    "no_provider": {"env_provider": ""},
    "zero_episodes": {"episodes_per_task": 0},
    "negative_episodes": {"config": {"episodes_per_task": -3}},
    "episodes_as_text": {"config": {"episodes_per_task": "many"}},
    "true_as_a_number": {"config": {"max_episode_steps": True}},
    "too_many_episodes": {"episodes_per_task": 10**12},
    "unknown_score": {"config": {"score": "beauty"}},
    "huge_integer": {"priority": 10**40},
    "integer_without_end": '"priority": ' + "9" * 5000,
    "timeout_beyond_all": {"timeout_seconds": 1e308},
    "timeout_not_a_number": '"timeout_seconds": NaN',
    "timeout_infinite": '"timeout_seconds": Infinity',
    "timeout_zero": {"timeout_seconds": 0},
    "number_beyond_double": '"colour": {"red": 1e400}',
    "memory_beyond_all": {"resources": {"memory_bytes": 10**30}},
    "long_name": {"benchmark_name": "x" * 10_000},
    "long_message": {"hf_repo_id": "x" * 10_000_000},
    "deep_config": {"config": json.loads('{"a": ' + "[" * 100 + "]" * 100 + "}")},
    "too_deep_for_json": '"config": {"a": ' + "[" * 400 + "]" * 400 + "}",
    "a_thousand_tags_and_one": {"tags": {str(number): "x" for number in range(1001)}},
    "a_million_tags": {"tags": {str(number): "" for number in range(1_000_000)}},
    "tags_that_are_no_texts": {"tags": dict.fromkeys("abcdefgh", 1)},
    "config_is_no_object": {"config": [1]},
    "sha256_too_short": {"artifact_sha256": "abc"},
    "image_without_digest": {"image": "ghcr.io/someone/policy:latest"},
    "expiry_without_zone": {"artifact_expires_at": "2026-01-02T03:04:05"},
    "half_a_character": '"hf_repo_id": "\\ud800"',
    "control_characters": {"priority": "\x00\x1b[2J"},
}

# Those that name none, or another job's: an operator sees them as held rows.
HELD = {
    "invalid_json": b"not json",
    "empty": b"",
    "cut_short": job(job_id=5)[:40],
    "binary": bytes(range(256)),
    "array": json.dumps([JOB]).encode(),
    "no_job_id": job(),
    "job_id_null": job(job_id=None),
    "job_id_negative": job(job_id=-1),
    "job_id_too_large": job(job_id=2**63),
    "job_id_as_text": job(job_id="5"),
    "job_id_true": job(job_id=True),
    "job_id_fraction": job(job_id=5.0),
    "too_deep_for_anybody": raw('"config": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}", job_id=5),
    "other_content": job(job_id=1, benchmark_name="Acrobot-v1"),
    "other_content_not_valid": job(job_id=1, episodes_per_task=0),
}


async def enqueue(pool: Pool, *payloads: bytes) -> list[int]:
    queries = Queries.from_asyncpg_pool(pool)
    return [int(row) for payload in payloads for row in await queries.enqueue(QUEUE_ADD_JOB, payload)]


def failing(job_id: int, fields: dict[str, Any] | str) -> bytes:
    if fields == FAILED["missing_fields"]:
        return json.dumps({"job_id": job_id, "miner_hotkey": "5Fminer"}).encode()
    return raw(fields, job_id=job_id) if isinstance(fields, str) else job(job_id=job_id, **fields)


async def test_every_bad_job_is_answered_and_a_good_one_behind_them_is_claimed(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=1)
    supervisors = FakeSupervisors(store)
    await store.insert(a_job(1), enqueue=False)
    ids = {case: number for number, case in enumerate(FAILED, start=100)}
    held = dict(zip(HELD, await enqueue(pool, *HELD.values()), strict=True))
    await enqueue(pool, *(failing(ids[case], fields) for case, fields in FAILED.items()))

    # There is one place only, and nothing but the queue's order: the good job is behind all of them.
    async with consuming(pool, store, supervisors, max_concurrent_jobs=1):
        await enqueue(pool, a_job(2).to_json())
        await eventually(lambda: is_claimed(supervisors, 2), seconds=60)

    assert supervisors.ensured == [2]
    for case, job_id in ids.items():
        result = await store.result(job_id)
        assert result is not None, case
        check_golden("bad_jobs", case, f"the result of the job: {result.status}\n{result.error}")
    shown = {row.row_id: row for row in await held_rows(pool, 100)}
    for case, row_id in held.items():
        row = shown.pop(row_id)
        named = "no job" if row.job_id is None else f"job {row.job_id}"
        text = f"a held row of add_job, which names {named}\n{row.reason}\npayload: {row.payload}"
        check_golden("bad_jobs", f"held_{case}", text)
    assert shown == {}
    assert await pool.fetchval("SELECT count(*) FROM jobs") == len(FAILED) + 2


async def is_claimed(supervisors: FakeSupervisors, job_id: int) -> bool:
    return job_id in supervisors.claims


async def test_bad_rows_are_looked_at_once_and_never_again(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    bad = await enqueue(pool, b"not json", job(job_id=5, priority="high"), job(job_id=-1))
    for job_id in (2, 3, 4):
        async with consuming(pool, store, supervisors := FakeSupervisors(store), max_concurrent_jobs=9):
            await enqueue(pool, a_job(job_id).to_json())
            await eventually(lambda job_id=job_id, supervisors=supervisors: is_claimed(supervisors, job_id))

    lines = await pool.fetch(
        """SELECT job_id, array_agg(status::text ORDER BY id) AS states FROM pgqueuer_log
           WHERE job_id = ANY($1) GROUP BY job_id ORDER BY job_id""",
        bad,
    )
    assert [row["states"][-1] for row in lines] == ["failed", "successful", "failed"]
    assert all(len(row["states"]) <= 3 for row in lines)
    assert await pool.fetchval("SELECT sum(attempts) FROM pgqueuer") == 0


async def test_bad_jobs_in_backoff_keep_no_place_from_a_good_one(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=1)
    troubles: dict[int, Any] = {job_id: RuntimeError("no supervisor for it") for job_id in range(100, 104)}
    supervisors = FakeSupervisors(store, troubles=troubles)
    await enqueue(pool, *(a_job(job_id).to_json() for job_id in troubles))

    async with consuming(pool, store, supervisors, max_concurrent_jobs=1):
        await enqueue(pool, a_job(2).to_json())
        await eventually(lambda: is_claimed(supervisors, 2), seconds=60)

    waiting = await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE status = 'queued' AND attempts > 0")
    assert waiting == len(troubles)


async def test_the_result_of_a_job_that_is_not_valid_says_whose_it_was(pool: Pool) -> None:
    store = a_store(pool)
    payload = job(job_id=5, episodes_per_task=0, benchmark_name=17)

    async with consuming(pool, store, FakeSupervisors(store)):
        await enqueue(pool, payload)
        await eventually(lambda: has_result(pool, 1))

    (message,) = await results(pool)
    names = ("miner_hotkey", "competition_id", "env_provider", "benchmark_name")
    assert [message[name] for name in names] == ["5Fminer", "autumn", "gymnasium", "unknown"]


async def has_result(pool: Pool, count: int) -> bool:
    return await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE entrypoint = $1", QUEUE_RESULT) == count


async def results(pool: Pool) -> list[dict[str, Any]]:
    rows = await pool.fetch("SELECT payload FROM pgqueuer WHERE entrypoint = $1 ORDER BY id", QUEUE_RESULT)
    return [json.loads(row["payload"]) for row in rows]


async def test_a_bad_job_that_comes_twice_has_one_result_and_another_under_its_id_is_held(pool: Pool) -> None:
    store = a_store(pool)
    payload = job(job_id=5, episodes_per_task=0)

    async with consuming(pool, store, FakeSupervisors(store)):
        twice = await enqueue(pool, payload, payload)
        other = await enqueue(
            pool, job(job_id=5, episodes_per_task=-1), job(job_id=5, episodes_per_task=0, miner_hotkey="x")
        )
        await enqueue(pool, job(job_id=5))
        await eventually(lambda: are_held(pool, 3))

    held = await held_rows(pool, 10)
    assert {row.row_id for row in held} >= set(other)
    assert not {row.row_id for row in held} & set(twice)
    assert all("job 5 exists with other content" in row.reason for row in held)
    assert len(await results(pool)) == 1


async def are_held(pool: Pool, count: int) -> bool:
    return len(await held_rows(pool, 10)) == count


async def test_the_same_job_again_is_the_same_job_whatever_its_timestamp(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    supervisors = FakeSupervisors(store)

    async with consuming(pool, store, supervisors, max_concurrent_jobs=9):
        same = await enqueue(pool, job(job_id=5), job(job_id=5, timestamp="2026-01-02T03:04:05Z"))
        await eventually(lambda: are_gone(pool, same))

    assert list(supervisors.claims) == [5]
    assert await held_rows(pool, 10) == []


async def are_gone(pool: Pool, rows: list[int]) -> bool:
    return await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE id = ANY($1)", rows) == 0


UNKNOWN = {
    "colour": "red",
    "nothing": None,
    "number": 123456789012345678901234567890,
    "nested": {"ключ": [1, 2.5, None, {"a": "\u0000"}], "empty": {}},
    "text": "a\u0000b\n\u2028\U0001f600",
}


async def test_unknown_fields_are_kept_byte_for_byte_in_the_job_and_in_its_result(pool: Pool) -> None:
    store = a_store(pool)
    supervisors = FakeSupervisors(store)
    payload = job(job_id=5, resources={"workers": 1, "tpus": None}, tags={"run": "7"}, **UNKNOWN)

    async with consuming(pool, store, supervisors):
        await enqueue(pool, payload)
        await eventually(lambda: is_claimed(supervisors, 5))
    await pool.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 s'")
    await store.finish_unheld(5, JobStatus.CANCELLED, "enough", store.failed_result)

    stored = json.loads(await pool.fetchval("SELECT message FROM jobs WHERE job_id = 5"))
    (message,) = await results(pool)
    as_bytes = lambda fields: {key: json.dumps(fields.get(key, "lost")) for key in UNKNOWN}  # noqa: E731
    assert as_bytes(stored) == as_bytes(message["extra_data"]["unknown_fields"]) == as_bytes(UNKNOWN)
    assert stored["resources"] == {"workers": 1, "tpus": None}
    assert message["extra_data"]["tags"] == {"run": "7"}
    again = EvalJobMessage.parse(json.dumps(stored))
    assert again.to_json() == EvalJobMessage.parse(again.to_json()).to_json()
