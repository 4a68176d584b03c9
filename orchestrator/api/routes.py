"""What can be asked over HTTP."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from orchestrator.adapters.postgres.api_tokens import ApiToken, Scope
from orchestrator.api.access import ApiAccess, ApiClient
from orchestrator.api.problems import Problem, ProblemBody
from orchestrator.api.schemas import (
    CancelRequest,
    HealthBody,
    JobBody,
    JobDetailsBody,
    JobsBody,
    ReadinessBody,
)
from orchestrator.client.job_messages import new_job_id, with_job_id
from orchestrator.domain.errors import JobNotFinished
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage

MOST_JOBS = 500
MOST_KEY_CHARS = 255
MAX_JOB_ID = 2**63 - 1
UNAUTHORIZED = {"WWW-Authenticate": 'Bearer realm="orchestrator"'}

bearer = HTTPBearer(auto_error=False, description="`orchestrator token create` makes one")
JobId = Annotated[int, Path(ge=0, le=MAX_JOB_ID)]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ProblemBody} for status in statuses}


def _access(request: Request) -> ApiAccess:
    access: ApiAccess = request.app.state.access
    return access


def _client(access: Annotated[ApiAccess, Depends(_access)]) -> ApiClient:
    return access.client()


Client = Annotated[ApiClient, Depends(_client)]


async def _token(
    client: Client, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> ApiToken:
    if given is None:
        raise Problem(401, "send a token: Authorization: Bearer orc_...", UNAUTHORIZED)
    token = await client.token(given.credentials)
    if token is None:
        raise Problem(401, "the token is unknown, revoked or expired", UNAUTHORIZED)
    return token


def _needs(scope: Scope) -> Any:
    async def check(token: Annotated[ApiToken, Depends(_token)]) -> ApiToken:
        if scope not in token.scopes:
            raise Problem(403, f"the token {token.name!r} has no scope {scope.value!r}")
        return token

    return Depends(check)


health = APIRouter(tags=["health"])
jobs = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=_problems(401, 403, 503))


@health.get("/healthz")
async def healthz() -> HealthBody:
    """This replica answers; see `/readyz` for whether jobs run."""
    return HealthBody()


@health.get("/readyz", responses={503: {"model": ReadinessBody}})
async def readyz(access: Annotated[ApiAccess, Depends(_access)], response: Response) -> ReadinessBody:
    """Whether jobs that are submitted now would run: database, schema version, consumer."""
    readiness = await access.readiness()
    if not readiness.ready:
        response.status_code = 503
    return readiness


@jobs.post(
    "",
    status_code=201,
    responses=_problems(409, 413, 422)
    | {200: {"model": JobBody, "description": "the same job was submitted before"}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/EvalJobMessage"}}},
        }
    },
)
async def submit(
    request: Request,
    response: Response,
    client: Client,
    token: Annotated[ApiToken, _needs(Scope.WRITE)],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=MOST_KEY_CHARS)] = None,
) -> JobBody:
    """Submit a job: the fields of an `add_job` message; without a `job_id` it gets one.

    With an `Idempotency-Key` the same request is the same job, however often it is sent. 201 for a new job,
    200 for one that was there, unchanged; either only once it is stored.
    """
    payload = await request.body()
    job_id = new_job_id()
    EvalJobMessage.parse(with_job_id(payload, job_id))
    if idempotency_key is not None:
        named = _named_job_id(payload)
        job_id = await client.reserve_job_id(
            token.token_id, idempotency_key, _canonical(payload), job_id if named is None else named
        )
    message = EvalJobMessage.parse(with_job_id(payload, job_id))
    fresh = await client.enqueue(message)
    response.status_code = 201 if fresh else 200
    response.headers["Location"] = f"/v1/jobs/{message.job_id}"
    (summary,) = await client.summaries([message.job_id])
    return JobBody.of(summary)


@jobs.get("", responses=_problems(422))
async def list_jobs(
    client: Client,
    _: Annotated[ApiToken, _needs(Scope.READ)],
    status: Annotated[list[JobStatus] | None, Query()] = None,
    benchmark: Annotated[str | None, Query(description="PROVIDER/NAME, a provider or a name")] = None,
    tag: Annotated[list[str] | None, Query(description="NAME=VALUE; a job has to have all")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_JOBS)] = 50,
) -> JobsBody:
    """The newest jobs that meet all that is given, newest first."""
    found = await client.jobs(statuses=status, benchmark=benchmark, tags=_tags(tag or []), limit=limit)
    return JobsBody(jobs=[JobBody.of(job) for job in found])


@jobs.get("/{job_id}", responses=_problems(404))
async def read_job(
    client: Client, _: Annotated[ApiToken, _needs(Scope.READ)], job_id: JobId
) -> JobDetailsBody:
    """How a job stands, its tasks, its history, and what it waits for."""
    return JobDetailsBody.of(await client.get(job_id))


@jobs.post(
    "/{job_id}/cancel",
    responses=_problems(404) | {202: {"model": JobBody, "description": "its supervisor ends it in a moment"}},
)
async def cancel_job(
    client: Client,
    _: Annotated[ApiToken, _needs(Scope.WRITE)],
    response: Response,
    job_id: JobId,
    request: CancelRequest | None = None,
) -> JobBody:
    """Cancel a job; of one that has ended nothing changes."""
    reason = (request or CancelRequest()).reason
    summary = await client.cancel(job_id, reason, wait=False)
    response.status_code = 200 if summary.status.is_final else 202
    return JobBody.of(summary)


@jobs.get("/{job_id}/result", responses=_problems(404, 409), response_model=EvalResultMessage)
async def read_result(
    client: Client, _: Annotated[ApiToken, _needs(Scope.READ)], job_id: JobId
) -> JSONResponse:
    """The job's one result, as the queue `eval_result` carries it; 409 while there is none."""
    result = await client.result(job_id)
    if result is None:
        (summary,) = await client.summaries([job_id])
        raise JobNotFinished(job_id, summary.status.value, 0.0)
    return JSONResponse(json.loads(result.to_json()))


def _named_job_id(payload: bytes) -> int | None:
    document = json.loads(payload)
    named = document.get("job_id")
    return None if named is None else int(named)


def _canonical(payload: bytes) -> bytes:
    """The request without what may differ when it is sent again: blanks, the order of fields, its time."""
    document = json.loads(payload)
    document.pop("timestamp", None)
    return json.dumps(document, sort_keys=True).encode()


def _tags(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    if any(not separator for _, separator, _ in pairs):
        raise Problem(422, "a tag is given as NAME=VALUE")
    return {name: value for name, _, value in pairs}
