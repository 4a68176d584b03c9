"""`python -m tests.chaos --seed 7 --kills 100`: a chaos run, its table, and what its checker found."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import recovery
from tests.chaos.audit import read_into
from tests.chaos.checker import violations
from tests.chaos.faults import Done, Injector, NoVictim
from tests.chaos.history import History
from tests.chaos.jobs import play_plainly
from tests.chaos.leftovers import leftovers
from tests.chaos.schedule import Fault, Kind, schedule
from tests.chaos.world import Installation, World, open_world

JOBS_AT_LEAST = 10  # of each of the two installations
ENDING_SECONDS = 300.0
# One at a time: a node that is started while the GCS is away would not come up.
BELOW_THE_CONTROL_PLANE = frozenset({Kind.KILL_RAYLET, Kind.KILL_GCS})
# Each happens about every so many points; a busy second passes some hundreds. Not in a policy's connection,
# whose failure the submission would have to answer for.
FAILPOINTS = (
    "seed={seed};processes=job-*,queue-consumer-*,result-sink-*,rollout-worker-*;dir={directory};"
    "policy_connection.*=delay:0.01@0.001;policy_connector.*=delay:0.01@0.001;environment.*=delay:0.01@0.001;"
    "*=kill@0.00005*{kills};postgres.*=cut@0.0001;ray.*=raise@0.0003;kubernetes.*=raise@0.001;"
    "host_client.*=raise@0.001;*=delay:0.2@0.0003"
)


@dataclass
class Run:
    """What was done, and how it went on."""

    done: list[Done] = field(default_factory=list)
    without_victim: list[Fault] = field(default_factory=list)
    recoveries: list[recovery.Recovery] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="what is done, and when; by default another one each time")
    parser.add_argument("--kills", type=int, default=100, help="how many faults; default: %(default)s")
    parser.add_argument("--gap", type=float, default=4.0, help="seconds between two; default: %(default)s")
    parser.add_argument("--no-failpoints", action="store_true", help="only what the schedule says")
    parser.add_argument(
        "--only",
        type=Kind,
        nargs="+",
        default=tuple(Kind),
        metavar="KIND",
        help=f"of all kinds: {', '.join(Kind)}",
    )
    parser.add_argument("--report", type=Path, help="write what was found there, as JSON")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"SEED={seed} KILLS={options.kills}", flush=True)
    return asyncio.run(_until_told(seed, options))


async def _until_told(seed: int, options: argparse.Namespace) -> int:
    """The run; SIGTERM ends it as Ctrl-C does, and nothing of it is left."""
    running = asyncio.create_task(_run(seed, options))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    return await running


async def _run(seed: int, options: argparse.Namespace) -> int:
    began = time.monotonic()
    run, history = Run(), History()
    faults_directory = Path(f"/tmp/orc-chaos-faults-{seed}-{time.time_ns()}")
    faults_directory.mkdir()
    failpoints = ""
    if not options.no_failpoints:
        failpoints = FAILPOINTS.format(
            seed=seed, directory=faults_directory, kills=max(options.kills // 5, 1)
        )
    async with open_world(seed, failpoints) as world:
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        quiet_seconds = await _disturb(
            world, schedule(seed, options.kills, options.gap, options.only), run, history
        )
    fired = [json.loads(file.read_text()) for file in faults_directory.glob("*.json")]
    for file in faults_directory.iterdir():
        file.unlink()
    faults_directory.rmdir()
    run.recoveries += recovery.told_by(history, run.done)
    found = violations(history)
    _print_report(run, history, fired, found, quiet_seconds, time.monotonic() - began)
    if options.report is not None:
        _write_report(options.report, seed, run, fired, found)
    return 1 if found else 0


async def _disturb(world: World, faults: list[Fault], run: Run, history: History) -> float:
    """Let jobs flow and faults happen; fill the history. The seconds until nothing was left."""
    enough = asyncio.Event()
    consuming = [asyncio.create_task(each.validator.consume()) for each in world.installations]
    feeding = [asyncio.create_task(each.keep_busy(JOBS_AT_LEAST, enough)) for each in world.installations]
    injector = Injector(world)
    try:
        await _do_all(world, injector, faults, run)
        enough.set()
        await asyncio.wait_for(asyncio.gather(*feeding), ENDING_SECONDS)
        await _until_all_have_results(world)
        history.leftovers, quiet_seconds = await leftovers(world)
    finally:
        injector.thaw_all()
        for task in (*consuming, *feeding):
            task.cancel()
        await asyncio.gather(*consuming, *feeding, return_exceptions=True)
    for installation in world.installations:
        await _note(history, installation)
    for done in run.done:
        if done.costs_an_episode and done.job_id is not None:
            history.done_to_submissions.setdefault(done.job_id, 0)
            history.done_to_submissions[done.job_id] += 1
    return quiet_seconds


async def _do_all(world: World, injector: Injector, faults: list[Fault], run: Run) -> None:
    began, below = time.monotonic(), asyncio.Lock()
    async with asyncio.TaskGroup() as group:

        async def do(fault: Fault) -> None:
            try:
                if fault.kind in BELOW_THE_CONTROL_PLANE:
                    async with below:
                        done = await injector.do(fault)
                else:
                    done = await injector.do(fault)
            except NoVictim:
                run.without_victim.append(fault)
                print(f"{fault.number:>5}  {fault.kind}: nobody was there", flush=True)
                return
            run.done.append(done)
            job = "" if done.job_id is None else f" (job {done.job_id})"
            print(f"{fault.number:>5}  {fault.kind}: {done.victim}{job}", flush=True)
            if (seen := await recovery.watched(world, done)) is not None:
                run.recoveries.append(seen)

        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at_seconds - time.monotonic()))
            group.create_task(do(fault))


async def _until_all_have_results(world: World) -> None:
    """Returns late where some are missing: the checker will name them."""
    until = time.monotonic() + ENDING_SECONDS
    while any(each.unfinished for each in world.installations) and time.monotonic() < until:
        await asyncio.sleep(0.2)


async def _note(history: History, installation: Installation) -> None:
    history.acknowledged |= installation.validator.acknowledged
    history.received += installation.validator.received
    seeds = await installation.line.ask(lambda connection: read_into(History(), connection))
    fresh = History()
    await installation.line.ask_once(lambda connection: read_into(fresh, connection))
    history.statuses |= fresh.statuses
    history.results |= fresh.results
    history.episodes += fresh.episodes
    history.writes += fresh.writes
    for job in installation.jobs.values():
        history.plays += job.plays()
        planned = seeds.get(job.job_id, [])
        outcomes = play_plainly(job.environment, [(seed, policy_seed) for _, _, seed, policy_seed in planned])
        for (task_id, episode_id, _, _), outcome in zip(planned, outcomes, strict=True):
            history.expected[job.job_id, task_id, episode_id] = outcome


def _print_report(
    run: Run,
    history: History,
    fired: list[dict[str, object]],
    found: list[str],
    quiet_seconds: float,
    seconds: float,
) -> None:
    kills = sum(fault["action"] in ("kill", "freeze") for fault in fired)
    by_action = Counter(str(fault["action"]) for fault in fired)
    print()
    print("\n".join(recovery.table(run.recoveries)))
    print()
    print(
        f"{len(run.done)} faults of the schedule ({len(run.without_victim)} found no victim), and at "
        f"failpoints {dict(by_action)}: {len(run.done) + kills} kills in all"
    )
    print(
        f"{len(history.acknowledged)} jobs acknowledged, {len(history.results)} results, "
        f"{len(history.episodes)} episodes, {len(history.received)} messages, "
        f"{len(history.plays)} episodes begun; nothing was left {quiet_seconds:.0f} s "
        f"after the last result; {seconds:.0f} s in all"
    )
    for violation in found:
        print(f"VIOLATION: {violation}")
    print(f"the checker found {len(found) or 'no'} violations", flush=True)


def _write_report(path: Path, seed: int, run: Run, fired: list[dict[str, object]], found: list[str]) -> None:
    report = {
        "seed": seed,
        "faults": [[done.fault.number, done.fault.kind, done.victim, done.job_id] for done in run.done],
        "without_victim": [fault.number for fault in run.without_victim],
        "failpoints": fired,
        "recoveries": [[each.kind, each.seconds] for each in run.recoveries],
        "violations": found,
    }
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
