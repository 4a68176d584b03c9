"""The client without an event loop: the same methods, a thread of its own, and nothing left of it."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from orchestrator.adapters.postgres.pool import open_pool
from orchestrator.client import AsyncClient, Client, JobStatus, UnknownJob, UsageError
from tests.conftest import run_in_own_loop
from tests.job_states import ended

if TYPE_CHECKING:
    from orchestrator.adapters.postgres.pool import Database

# For programs that follow their own jobs, which the command line alone is.
ASYNC_ONLY = {"enqueue", "keeping_alive", "cancel_orphans", "unfinished_artifacts", "liveness", "database"}


def public(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


def test_it_has_the_methods_of_the_asynchronous_one() -> None:
    wanted = {name: one for name, one in public(AsyncClient).items() if name not in ASYNC_ONLY}

    assert {name: list(one.parameters.values()) for name, one in public(Client).items()} == {
        name: list(one.parameters.values()) for name, one in wanted.items()
    }
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    assert Client.wait.__doc__ == AsyncClient.wait.__doc__


def test_it_submits_follows_and_reads(database: Database) -> None:
    run_in_own_loop(lambda: an_ended_job(database))

    with Client(database.dsn) as client:
        job_id = client.submit(env_provider="gymnasium", benchmark_name="CartPole-v1")
        assert client.get(job_id).status is JobStatus.QUEUED
        assert client.cancel(job_id).status is JobStatus.CANCELLED
        assert {job.job_id for job in client.jobs()} == {1, job_id}
        assert client.wait(1).status is JobStatus.COMPLETED
        assert len(list(client.stream(1))) == 15
        assert next(client.stream(1)).number == 1
        with pytest.raises(UnknownJob):
            client.get(99)

    assert not [thread for thread in threading.enumerate() if thread.name == "orchestrator-client"]
    with pytest.raises(UsageError, match="not open"):
        client.jobs()


async def an_ended_job(database: Database) -> None:
    async with open_pool(database, application_name="tests") as pool:
        await ended(pool, 1)


def test_ctrl_c_ends_the_call_that_waits_and_the_client_goes_on(database: Database) -> None:
    with Client(database.dsn) as client:
        job_id = client.submit(env_provider="gymnasium", benchmark_name="CartPole-v1")
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                client.wait(job_id)
        finally:
            signal.signal(signal.SIGALRM, before)

        assert client.get(job_id).status is JobStatus.QUEUED


def test_a_database_that_is_not_there_leaves_no_thread() -> None:
    with pytest.raises(UsageError, match="malformed"), Client("postgresql://user:pass word@[/x"):
        pass

    assert not [thread for thread in threading.enumerate() if thread.name == "orchestrator-client"]


def test_a_program_that_uses_the_client_loads_no_ray() -> None:
    code = "import sys, orchestrator.client; sys.exit('ray' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
