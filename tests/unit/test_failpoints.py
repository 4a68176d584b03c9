"""How failpoints are armed, what they do, and that they cost nothing while they are off."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import failpoints, fault_plan
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.fault_plan import Action, FaultPlan, Rule, parse
from tests.stepping import Recorder

REACH = (
    "from orchestrator import failpoints; failpoints.enter_process('job-7'); failpoints.reach('a.b.after')"
)


class Store:
    field = "a field"

    @property
    def name(self) -> str:
        return "a property"

    async def get(self, number: int, *, more: int = 0) -> int:
        return number + more

    def make(self) -> Store:
        return Store()


def run_armed(text: str, code: str = REACH) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {fault_plan.VARIABLE: text},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# ---------------------------------------------------------------------------------------------- off


def test_nothing_is_wrapped_while_nothing_is_armed() -> None:
    store = Store()

    assert not failpoints.is_armed()
    assert failpoints.instrumented(store, "store") is store
    assert failpoints.around("a") is failpoints.around("b")


async def test_points_pass_while_nothing_is_armed() -> None:
    failpoints.reach("a.before")
    await failpoints.reach_async("a.before")


# ------------------------------------------------------------------------------------------- wrapped


async def test_an_instrumented_adapter_answers_as_the_adapter_does() -> None:
    with failpoints.armed(Recorder()):
        store = failpoints.instrumented(Store(), "store")

        answer = await store.get(1, more=2)

    assert (answer, store.name, store.field) == (3, "a property", "a field")


async def test_what_a_method_returns_is_instrumented_where_that_is_named() -> None:
    recorder = Recorder()

    with failpoints.armed(recorder):
        await failpoints.instrumented(Store(), "outer", {"make": "inner"}).make().get(1)

    assert recorder.points == [
        *("outer.make.before", "outer.make.after"),
        *("inner.get.before", "inner.get.after"),
    ]


def test_an_instrumented_connector_goes_to_a_worker_and_is_instrumented_there_if_that_is_armed() -> None:
    with failpoints.armed(Recorder()):
        connector = failpoints.instrumented(
            WebSocketConnector("host", 1), "connector", {"connect": "connection"}
        )
        sent = pickle.dumps(connector)
        arrived = pickle.loads(sent)
    arrived_unarmed = pickle.loads(sent)

    assert isinstance(arrived, failpoints.Instrumented)
    assert arrived_unarmed == WebSocketConnector("host", 1)


def test_a_call_that_raises_reaches_no_point_after_it() -> None:
    recorder = Recorder()

    with failpoints.armed(recorder), pytest.raises(ZeroDivisionError), failpoints.around("a"):
        raise ZeroDivisionError

    assert recorder.points == ["a.before"]


# ------------------------------------------------------------------------------------------- the plan


def test_a_plan_is_read_from_a_text() -> None:
    plan = parse("seed=7; processes=job-*,result-sink-*; *=kill@0.001; ledger.commit.after=delay:0.5*2;")

    assert plan.rules == (
        Rule("*", Action.KILL, probability=0.001),
        Rule("ledger.commit.after", Action.DELAY, seconds=0.5, times=2),
    )
    assert (plan.seed, plan.processes) == ("7", ("job-*", "result-sink-*"))


@pytest.mark.parametrize(
    "text", ["a=explode", "a=kill@often", "a", "=kill", "a=delay", "a=kill:3", "a=kill*-1", "a=kill@0.1@0.2"]
)
def test_a_malformed_plan_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"ORCHESTRATOR_FAILPOINTS: "):
        parse(text)


def fired(plan: FaultPlan, points: int = 1000) -> list[int]:
    """At which of so many points the plan let the call fail."""
    found = []
    for number in range(points):
        try:
            plan.reach("a.before", None)
        except InfrastructureError:
            found.append(number)
    return found


def test_a_probability_lets_some_fail_and_the_seed_says_which() -> None:
    first, again, other = (fired(parse(f"seed={seed}; a.*=raise@0.1")) for seed in (1, 1, 2))

    assert first == again != other
    assert 50 < len(first) < 200


def test_times_bounds_the_faults_of_a_process() -> None:
    plan = parse("a.*=raise*3")

    assert fired(plan) == [0, 1, 2]


def test_times_bounds_the_faults_of_all_processes_where_they_share_a_directory(tmp_path: Path) -> None:
    text = f"dir={tmp_path}; a.*=raise*3"

    found = [len(fired(parse(text))) for _ in range(2)]

    assert found == [3, 0]
    assert len(list(tmp_path.iterdir())) == 3


def test_every_fault_leaves_a_note_of_where_and_what_before_it_happens(tmp_path: Path) -> None:
    process = run_armed(f"dir={tmp_path}; a.b.after=kill*1")
    process.communicate()

    (note,) = tmp_path.iterdir()
    told = json.loads(note.read_text())
    assert told.pop("at") > 0
    assert told == {"point": "a.b.after", "action": "kill", "process": "job-7", "pid": process.pid}


def test_a_fault_without_a_limit_leaves_a_note_each_time(tmp_path: Path) -> None:
    assert len(fired(parse(f"dir={tmp_path}; a.*=raise"), points=5)) == len(list(tmp_path.iterdir())) == 5


def test_the_first_rule_that_is_not_used_up_decides() -> None:
    plan = parse("a.before=raise*1; a.*=delay:0.001; *=raise")

    assert fired(plan, points=3) == [0]


# -------------------------------------------------------------------------------------------- actions


@pytest.mark.parametrize(
    ("text", "returned"),
    [
        ("a.b.after=kill", -signal.SIGKILL),
        ("processes=job-*; *=kill", -signal.SIGKILL),
        ("processes=result-sink-*; *=kill", 0),
        ("a.b.before=kill", 0),
        ("a.b.after=kill*0", 0),
        ("a.b.after=raise", 1),
    ],
)
def test_the_variable_arms_a_process(text: str, returned: int) -> None:
    process = run_armed(text)
    output, _ = process.communicate()

    assert process.returncode == returned, output


def test_a_frozen_process_goes_on_where_it_stopped_once_it_is_thawed() -> None:
    process = run_armed("a.b.after=freeze")

    _, status = os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate()

    assert os.WIFSTOPPED(status)
    assert process.returncode == 0, output


def test_a_point_that_fires_is_told_on_standard_error_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REACH],
        env=os.environ | {fault_plan.VARIABLE: "a.b.after=delay:0.001"},
        capture_output=True,
        check=True,
    )

    armed, fired = map(json.loads, done.stderr.splitlines())
    assert (armed["event"], fired["event"], fired["point"]) == ("failpoints_armed", "failpoint", "a.b.after")
    assert done.stdout == b""


def test_a_malformed_variable_ends_a_process_with_the_reason() -> None:
    process = run_armed("a=explode")
    output, _ = process.communicate()

    assert process.returncode == 1
    assert "a=explode is no rule; PATTERN=ACTION" in output


async def test_a_cut_aborts_the_connection_and_fails_where_there_is_none() -> None:
    plan = parse("*=cut")

    def cut() -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await plan.reach_async("a", cut)
    with pytest.raises(InfrastructureError, match="failpoint a"):
        await plan.reach_async("a", None)


async def test_a_delay_of_a_coroutine_does_not_block_its_loop() -> None:
    delayed = asyncio.create_task(parse("*=delay:30").reach_async("a", None))

    await asyncio.sleep(0)

    assert not delayed.done()
    delayed.cancel()
    await asyncio.wait({delayed})


def test_other_processes_are_armed_as_this_one_is(monkeypatch: Any) -> None:
    monkeypatch.delenv(fault_plan.VARIABLE, raising=False)
    assert failpoints.inherited() == {}

    monkeypatch.setenv(fault_plan.VARIABLE, "*=raise")
    assert failpoints.inherited() == {fault_plan.VARIABLE: "*=raise"}
