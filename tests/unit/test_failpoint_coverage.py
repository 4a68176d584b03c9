"""That no outside call is without failpoints: ports, statements, Ray, and the source as a whole."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from orchestrator import failpoints
from orchestrator.adapters.postgres.failpoint_connection import FailpointConnection, connecting
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.pool import Database, open_connection, open_pool
from orchestrator.app import _connector as policy_connector
from orchestrator.local_containers import submission_host
from orchestrator.ports import Endpoint
from orchestrator.settings import Settings
from orchestrator.stores import job_store, ledger, open_containers
from tests.failpoint_rules import adapter_names, methods_of, outside_ports, sources, violations
from tests.job_fixtures import a_job, a_store, claimed, finished, planned_runs
from tests.stepping import Recorder
from tests.unit.actors.control_fakes import FakeSupervisors, consuming, eventually

PORT_METHODS = [(name, method) for name, port in outside_ports().items() for method in methods_of(port)]

# Each talks to the outside in a way that no failpoint sees.
PLANTED = {
    "a connection of its own": (
        "adapters/postgres/new.py",
        "async def f(dsn):\n  await asyncpg.connect(dsn)",
    ),
    "a pool of its own": ("adapters/postgres/new.py", "async def f(dsn):\n  await asyncpg.create_pool(dsn)"),
    "a cursor": ("adapters/postgres/new.py", "async def f(connection):\n  connection.cursor('SELECT 1')"),
    "a prepared statement": ("adapters/postgres/new.py", "async def f(c):\n  await c.prepare('SELECT 1')"),
    "SQL in an actor": ("actors/new.py", "async def f(pool):\n  await pool.fetchval('SELECT 1')"),
    "a kill": ("actors/new.py", "def f(actor):\n  ray.kill(actor)"),
    "a kill on a thread": ("actors/new.py", "async def f(a):\n  await asyncio.to_thread(ray.kill, a)"),
    "a question to an actor": ("app.py", "async def f(actor):\n  await actor.ping.remote()"),
    "an actor made": ("actors/new.py", "def f():\n  Actor.options(name='a').remote()"),
    "a function of Ray": ("actors/new.py", "from ray.util.placement_group import placement_group"),
    "a call to Ray without points": ("actors/ray_calls.py", "def f(name):\n  return ray.get_actor(name)"),
    "a store without points": ("app.py", "def f(pool):\n  return PostgresLedger(pool, rows)"),
    "containers without points": ("app.py", "def f(settings):\n  return submission_containers(settings)"),
    "a connector without points": ("app.py", "def f():\n  return WebSocketConnector('', 0)"),
    "a process": ("actors/new.py", "def f():\n  subprocess.run(['true'])"),
    "a dial": ("app.py", "async def f():\n  await asyncio.open_connection('', 1)"),
    "a call of the API server": (
        "adapters/kubernetes/new.py",
        "async def f(client):\n  await client.call_api('GET', '/')",
    ),
    "a process of an adapter": ("adapters/process/new.py", "def f():\n  subprocess.Popen(['true'])"),
    "a fetch without points": (
        "app.py",
        "from orchestrator.adapters.artifacts.fetch import fetch_archive\n"
        "async def f(m, t, l):\n  await fetch_archive(m, t, l)",
    ),
}


def test_nothing_of_the_control_plane_goes_past_its_failpoints() -> None:
    found = violations(sources())

    assert found == []


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_an_outside_call_without_failpoints_is_found(planted: tuple[str, str]) -> None:
    path, text = planted

    found = violations({path: text})

    assert found, text


@pytest.mark.parametrize(("port", "method"), PORT_METHODS)
async def test_every_method_of_a_port_has_a_point_on_both_sides(port: str, method: str) -> None:
    adapter = _adapter_of(port)()
    recorder = Recorder()

    with failpoints.armed(recorder):
        answer = getattr(failpoints.instrumented(adapter, port), method)()
        answer = await answer if inspect.isawaitable(answer) else answer

    assert recorder.points == [f"{port}.{method}.before", "called", f"{port}.{method}.after"]
    assert answer == method


def _adapter_of(port: str) -> Any:
    """A class with the port's methods, each of which notes that it was called and returns its name."""

    def blocking(name: str) -> Any:
        def method(self: Any) -> str:
            failpoints.reach("called")
            return name

        return method

    def asynchronous(name: str) -> Any:
        async def method(self: Any) -> str:
            failpoints.reach("called")
            return name

        return method

    protocol = outside_ports()[port]
    kinds = {
        name: asynchronous if inspect.iscoroutinefunction(getattr(protocol, name)) else blocking
        for name in methods_of(protocol)
    }
    return type(port, (), {name: kind(name) for name, kind in kinds.items()})


def test_the_adapters_of_every_port_that_goes_outside_are_known() -> None:
    known = adapter_names()

    assert {
        "PostgresJobStore",
        "PostgresLedger",
        "ProcessContainers",
        "KubernetesContainers",
        "WebSocketConnector",
        "SubmissionHostClient",
    } <= known


STATEMENTS: dict[str, tuple[Any, ...]] = {
    "execute": ("SELECT 1",),
    "executemany": ("DELETE FROM claims WHERE job_id = $1", [(1,), (2,)]),
    "fetch": ("SELECT 1",),
    "fetchval": ("SELECT 1",),
    "fetchrow": ("SELECT 1",),
    "copy_records_to_table": ("claims",),
    "add_listener": ("channel", print),
    "remove_listener": ("channel", print),
}
LISTENERS = {"add_listener", "remove_listener"}  # asyncpg's own, by `fetch`


def test_every_method_of_the_connection_is_tried_here() -> None:
    overridden = {name for name, value in vars(FailpointConnection).items() if inspect.isfunction(value)}

    assert {name for name in overridden if not name.startswith("_")} | LISTENERS == STATEMENTS.keys()


@pytest.mark.parametrize("method", STATEMENTS)
@pytest.mark.parametrize("through", ["pool", "connection"])
async def test_a_statement_has_a_point_on_both_sides_however_it_is_sent(
    database: Database, method: str, through: str
) -> None:
    options = {"records": []} if method == "copy_records_to_table" else {}
    recorder = Recorder()

    with failpoints.armed(recorder):
        if through == "pool":
            async with open_pool(database, application_name="tests") as pool, pool.acquire() as connection:
                if method == "remove_listener":
                    await connection.add_listener(*STATEMENTS[method])
                recorder.points.clear()
                await getattr(connection, method)(*STATEMENTS[method], **options)
                points = list(recorder.points)
                connection.terminate()
        else:
            async with open_connection(database.dsn) as connection:
                if method == "remove_listener":
                    await connection.add_listener(*STATEMENTS[method])
                recorder.points.clear()
                await getattr(connection, method)(*STATEMENTS[method], **options)
                points = list(recorder.points)

    calls = [point.rpartition(".") for point in points]
    assert [side for _, _, side in calls] == ["before", "after"]
    assert calls[0][0] == calls[1][0]


async def test_a_transaction_has_points_round_its_begin_its_commit_and_its_rollback(
    database: Database,
) -> None:
    recorder = Recorder()

    with failpoints.armed(recorder):
        async with open_connection(database.dsn) as connection:
            recorder.points.clear()
            async with connection.transaction():
                pass
            with pytest.raises(ZeroDivisionError):
                async with connection.transaction():
                    raise ZeroDivisionError
            statements = [point.split(".")[-2:] for point in recorder.points]

    expected = ["begin", "commit", "begin", "rollback"]
    assert statements == [[name, side] for name in expected for side in ("before", "after")]


async def test_connecting_has_a_point_on_both_sides(database: Database) -> None:
    recorder = Recorder()

    with failpoints.armed(recorder):
        async with open_pool(database, application_name="tests", max_size=1):
            points = list(recorder.points)

    assert points == ["postgres.connect.before", "postgres.connect.after"]


def test_connections_are_asyncpgs_own_while_nothing_is_armed() -> None:
    assert connecting() is asyncpg.connect


async def test_a_point_is_named_by_who_asks_and_what_for(database: Database) -> None:
    recorder = Recorder()

    with failpoints.armed(recorder):
        async with open_pool(database, application_name="tests", max_size=1) as pool:
            claim = await claimed(a_store(pool))
            runs = await planned_runs(pool, claim)
            recorder.points.clear()
            await PostgresLedger(pool).commit([finished(run) for run in runs])

    before = [point.removesuffix(".before") for point in recorder.points if point.endswith(".before")]
    assert before == [
        "postgres.ledger.commit.begin",
        "postgres.ledger.commit.lock_shared",
        "postgres.ledger.commit.select_jobs",
        "postgres.ledger.commit.select_episodes",
        "postgres.ledger.commit.update_episodes",
        "postgres.ledger.commit.insert_pgqueuer",
        "postgres.ledger.commit.commit",
        "postgres.reset",
    ]


async def test_an_acknowledgement_of_the_queue_is_a_point_of_its_own(database: Database) -> None:
    recorder = Recorder()

    with failpoints.armed(recorder):
        async with open_pool(database, application_name="tests") as pool:
            store = a_store(pool)
            await store.insert(a_job(), enqueue=True)
            async with consuming(pool, store, FakeSupervisors(store)):
                await eventually(lambda: _is_empty(pool))

    acknowledged = [point for point in recorder.points if point.startswith("queue.acknowledge.")]
    assert acknowledged == [f"queue.acknowledge.insert_pgqueuer_log.{side}" for side in ("before", "after")]


async def _is_empty(pool: Any) -> bool:
    return not await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE entrypoint = 'add_job'")


async def test_what_the_composition_root_hands_out_is_instrumented_while_points_are_armed(
    tmp_path: Path,
) -> None:
    settings, pool, endpoint, key = (
        Settings(data_dir=tmp_path),
        cast(Any, None),
        Endpoint("host", 1),
        bytes(32),
    )

    async def made() -> list[object]:
        async with open_containers(settings) as containers:
            return [
                job_store(pool, settings),
                ledger(pool, settings),
                submission_host(settings, endpoint, key),
                policy_connector(endpoint, key),
                containers,
            ]

    with failpoints.armed(Recorder()):
        armed = await made()
    unarmed = await made()

    assert {type(each) for each in armed} == {failpoints.Instrumented}
    assert failpoints.Instrumented not in {type(each) for each in unarmed}
