from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from uuid import uuid4

import httpx
import pytest

from orchestrator.adapters.postgres.api_tokens import Scope, create_token, revoke_token
from orchestrator.adapters.postgres.installation import note_consumer
from orchestrator.adapters.postgres.pool import Database
from orchestrator.api.access import ApiAccess
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from tests.conftest import execute
from tests.unit.api.conftest import JOB, MAX_BODY_BYTES, Asked


async def test_a_submitted_job_is_stored_with_its_queue_row_before_it_is_acknowledged(asked: Asked) -> None:
    answer = await asked("POST", "/v1/jobs", json=JOB)

    job_id = answer.json()["job_id"]
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job_id}"
    assert answer.json()["status"] == "QUEUED"
    payload = await asked.pool.fetchval("SELECT payload FROM pgqueuer WHERE entrypoint = 'add_job'")
    assert json.loads(payload)["job_id"] == job_id
    assert not await asked.pool.fetchval("SELECT local FROM jobs")


async def test_a_request_that_is_sent_again_with_its_key_is_the_same_job(asked: Asked) -> None:
    first = await asked("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "a"})
    reordered = dict(reversed(list(JOB.items())))
    again = await asked("POST", "/v1/jobs", json=reordered, headers={"Idempotency-Key": "a"})
    other = await asked("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "b"})

    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 201)
    assert again.json()["job_id"] == first.json()["job_id"] != other.json()["job_id"]
    assert await asked.jobs() == 2


async def test_requests_with_one_key_that_come_at_once_are_one_job(asked: Asked) -> None:
    answers = await asyncio.gather(
        *(asked("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "a"}) for _ in range(8))
    )

    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert await asked.jobs() == 1


async def test_a_crash_between_the_key_and_the_job_leaves_a_key_that_works(asked: Asked) -> None:
    token = await asked.access.client().token(asked.secret)
    assert token is not None
    canonical = json.dumps(JOB, sort_keys=True).encode()
    await asked.access.client().reserve_job_id(token.token_id, "a", canonical, 77)

    answer = await asked("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "a"})

    assert (answer.status_code, answer.json()["job_id"]) == (201, 77)


async def test_a_key_that_comes_with_another_job_is_refused(asked: Asked) -> None:
    await asked("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "a"})
    answer = await asked("POST", "/v1/jobs", json=JOB | {"priority": 1}, headers={"Idempotency-Key": "a"})

    assert answer.status_code == 422
    assert "send a new key with a new job" in answer.json()["detail"]
    assert await asked.jobs() == 1


async def test_keys_of_different_tokens_do_not_meet(asked: Asked) -> None:
    other = await create_token(asked.pool, "other", {Scope.WRITE})

    first = await asked("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "a"})
    second = await asked(
        "POST",
        "/v1/jobs",
        json=JOB,
        headers={"Idempotency-Key": "a", "Authorization": f"Bearer {other.secret}"},
    )

    assert second.status_code == 201
    assert first.json()["job_id"] != second.json()["job_id"]


async def test_a_job_id_of_the_client_is_the_job_as_in_the_queue(asked: Asked) -> None:
    same = JOB | {"job_id": 5}
    first = await asked("POST", "/v1/jobs", json=same)
    again = await asked("POST", "/v1/jobs", json=same)
    taken = await asked("POST", "/v1/jobs", json=same | {"priority": 3})

    assert (first.status_code, again.status_code, taken.status_code) == (201, 200, 409)
    assert taken.json()["detail"].startswith("job 5 exists with other content")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "it is empty"),
        (b"[1", "it is not JSON"),
        (b"[]", "not valid"),
        (b'{"env_provider": "gymnasium"}', "benchmark_name is missing"),
        (json.dumps(JOB | {"episodes_per_task": 0}).encode(), "episodes_per_task"),
        (json.dumps(JOB | {"job_id": -1}).encode(), "job_id"),
        (json.dumps(JOB | {"job_id": None}).encode(), "job_id"),
        (b"\xff", "not JSON"),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "a"}])
async def test_a_body_that_is_no_job_is_refused_with_the_reason(
    asked: Asked, body: bytes, words: str, headers: dict[str, str]
) -> None:
    answer = await asked("POST", "/v1/jobs", content=body, headers=headers)

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]
    assert await asked.jobs() == 0


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_above_the_cap_is_refused(asked: Asked, announced: bool) -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)

    async def pieces() -> object:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    answer = await asked("POST", "/v1/jobs", content=body if announced else pieces())

    assert answer.status_code == 413


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer orc_wrong", "Basic YTpi", "Bearer \x7f"])
async def test_nothing_of_jobs_is_told_without_a_valid_token(asked: Asked, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    paths = [("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/1"), ("GET", "/v1/jobs/1/result")]

    answers = [await asked.http.request(method, path, headers=headers) for method, path in paths]

    assert {answer.status_code for answer in answers} == {401}
    assert all("Bearer" in answer.headers["www-authenticate"] for answer in answers)


async def test_a_token_ends_when_it_is_revoked_or_its_time_is_over(asked: Asked) -> None:
    short = await create_token(asked.pool, "short", {Scope.READ}, valid_seconds=3600)
    headers = {"Authorization": f"Bearer {short.secret}"}
    assert (await asked("GET", "/v1/jobs", headers=headers)).status_code == 200

    await asked.pool.execute("UPDATE api_tokens SET expires_at = now() - interval '1 s' WHERE name = 'short'")
    await revoke_token(asked.pool, "all")

    assert (await asked("GET", "/v1/jobs", headers=headers)).status_code == 401
    assert (await asked("GET", "/v1/jobs")).status_code == 401


async def test_a_token_that_may_only_read_changes_nothing(asked: Asked) -> None:
    reader = await create_token(asked.pool, "reader", {Scope.READ})
    job_id = (await asked("POST", "/v1/jobs", json=JOB)).json()["job_id"]
    headers = {"Authorization": f"Bearer {reader.secret}"}

    submitted = await asked("POST", "/v1/jobs", json=JOB, headers=headers)
    cancelled = await asked("POST", f"/v1/jobs/{job_id}/cancel", headers=headers)
    read = await asked("GET", f"/v1/jobs/{job_id}", headers=headers)

    assert (submitted.status_code, cancelled.status_code, read.status_code) == (403, 403, 200)
    assert read.json()["status"] == "QUEUED"


async def test_jobs_are_listed_newest_first_by_status_benchmark_and_tag(asked: Asked) -> None:
    for number, tags in enumerate([{"team": "a"}, {"team": "b"}, {"team": "a"}]):
        await asked("POST", "/v1/jobs", json=JOB | {"job_id": number, "tags": tags})
    await asked("POST", "/v1/jobs/2/cancel")

    every = (await asked("GET", "/v1/jobs?limit=2")).json()["jobs"]
    queued = (await asked("GET", "/v1/jobs?status=QUEUED&tag=team=a")).json()["jobs"]
    other = (await asked("GET", "/v1/jobs?benchmark=metaworld")).json()["jobs"]

    assert [job["job_id"] for job in every] == [2, 1]
    assert [job["job_id"] for job in queued] == [0]
    assert other == []


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "status=NOPE", "tag=a"])
async def test_a_list_that_cannot_be_is_refused(asked: Asked, query: str) -> None:
    answer = await asked("GET", f"/v1/jobs?{query}")

    assert answer.status_code == 422
    assert answer.json()["detail"]


async def test_a_job_that_is_cancelled_before_anybody_takes_it_ends_at_once_with_its_result(
    asked: Asked,
) -> None:
    job_id = (await asked("POST", "/v1/jobs", json=JOB)).json()["job_id"]
    early = await asked("GET", f"/v1/jobs/{job_id}/result")

    cancelled = await asked("POST", f"/v1/jobs/{job_id}/cancel", json={"reason": "a better one is there"})
    again = await asked("POST", f"/v1/jobs/{job_id}/cancel")
    result = await asked("GET", f"/v1/jobs/{job_id}/result")

    assert early.status_code == 409
    assert early.json()["detail"] == f"job {job_id} has not ended: it is QUEUED"
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "CANCELLED")
    assert again.json()["detail"] == "a better one is there"
    assert (result.json()["status"], result.json()["job_id"]) == ("CANCELLED", job_id)


async def test_a_job_that_a_supervisor_holds_is_cancelled_by_that(asked: Asked) -> None:
    job_id = (await asked("POST", "/v1/jobs", json=JOB)).json()["job_id"]
    await asked.access.client()._now.store.claim(job_id, uuid4())

    answer = await asked("POST", f"/v1/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["status"]) == (202, "STARTING")
    assert answer.json()["cancel_requested_at"] is not None


@pytest.mark.parametrize("path", ["/v1/jobs/9", "/v1/jobs/9/result"])
async def test_a_job_that_is_not_there_is_not_found(asked: Asked, path: str) -> None:
    answer = await asked("GET", path)

    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no job 9")


@pytest.mark.parametrize("job_id", ["x", "-1", str(2**63)])
async def test_what_is_no_job_id_is_refused(asked: Asked, job_id: str) -> None:
    assert (await asked("GET", f"/v1/jobs/{job_id}")).status_code == 422


async def test_a_job_says_what_it_waits_for_and_what_happened_to_it(asked: Asked) -> None:
    job_id = (await asked("POST", "/v1/jobs", json=JOB)).json()["job_id"]

    job = (await asked("GET", f"/v1/jobs/{job_id}")).json()

    assert job["waits_for"].startswith("a control plane: none works on this database")
    assert [(change["status"], change["detail"]) for change in job["history"]] == [
        ("QUEUED", "waits in the queue")
    ]


async def test_a_replica_is_healthy_and_not_ready_while_nobody_takes_jobs(asked: Asked) -> None:
    health = await asked.http.get("/healthz")
    before = await asked.http.get("/readyz")
    await note_consumer(asked.pool)
    after = await asked.http.get("/readyz")
    await asked.pool.execute("UPDATE installation SET consumer_seen_at = now() - interval '10 minutes'")
    silent = await asked.http.get("/readyz")

    assert health.json() == {"status": "ok"}
    assert (before.status_code, after.status_code, silent.status_code) == (503, 200, 503)
    assert "none has worked" in before.text
    assert "600 s ago: too long ago" in silent.text


async def test_a_schema_of_another_version_is_not_ready(asked: Asked) -> None:
    await note_consumer(asked.pool)
    await asked.pool.execute("INSERT INTO schema_migrations (version, name) VALUES (9999, 'later')")

    answer = await asked.http.get("/readyz")

    assert answer.status_code == 503
    assert "schema version 9999, this orchestrator knows" in answer.text


async def test_before_there_is_a_database_requests_are_told_to_come_again(
    http_of: Callable[[ApiAccess], httpx.AsyncClient],
) -> None:
    access = ApiAccess()
    access.why_not = "the control plane waits for its database"
    async with http_of(access) as http:
        health, ready, jobs = [await http.get(path) for path in ("/healthz", "/readyz", "/v1/jobs")]

    assert (health.status_code, ready.status_code, jobs.status_code) == (200, 503, 503)
    assert jobs.headers["retry-after"] == "5"
    assert "waits for its database" in ready.text


async def test_a_database_that_is_away_gives_503_and_never_a_false_acknowledgement(
    asked: Asked, postgres_server: Database
) -> None:
    asked.access.client()._patience_seconds = 0.2
    name = await asked.pool.fetchval("SELECT current_database()")
    await execute(
        postgres_server,
        f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
    )

    answer = await asked("POST", "/v1/jobs", json=JOB)
    ready = await asked.http.get("/readyz")

    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert name not in answer.text
    assert ready.status_code == 503


async def test_the_schema_describes_the_job_message_and_the_token(asked: Asked) -> None:
    schema = (await asked.http.get("/openapi.json")).json()

    assert set(schema["paths"]) == {
        "/healthz",
        "/readyz",
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/result",
    }
    message = schema["components"]["schemas"]["EvalJobMessage"]
    assert set(message["properties"]) == set(EvalJobMessage.model_fields)
    assert "job_id" not in message["required"]
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert set(schema["components"]["schemas"]["JobStatus"]["enum"]) == {status.value for status in JobStatus}


async def test_only_hashes_of_tokens_are_stored(asked: Asked) -> None:
    rows = await asked.pool.fetch("SELECT t::text AS row FROM api_tokens t")

    assert asked.secret.startswith("orc_")
    assert all(asked.secret not in row["row"] for row in rows)
