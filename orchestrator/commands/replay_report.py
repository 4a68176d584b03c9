"""What `orchestrator replay` prints: each episode as it comes, and what to make of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.domain.replay import Aspect, EpisodeReplay, Playback, RecordedEpisode, Verdict
from orchestrator.logging import escape_control_characters

EXIT_CODES = {Verdict.EQUAL: 0, Verdict.DIFFERS: 1, Verdict.IMPOSSIBLE: 3}
WORDS = {Verdict.EQUAL: "equal", Verdict.DIFFERS: "DIFFERS", Verdict.IMPOSSIBLE: "cannot be replayed"}


@dataclass
class ReplayReport:
    """Gathers the replays of a job. `quiet` prints nothing before the end, and that as JSON."""

    job: EvalJobMessage
    result: EvalResultMessage | None
    versions_now: Mapping[str, str]
    quiet: bool
    left_out: int = 0
    replays: list[EpisodeReplay] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where something differs, or else 3 where something cannot be replayed, or else 0."""
        codes = {EXIT_CODES[replay.verdict] for replay in self.replays}
        return next((code for code in (1, 3) if code in codes), 0)

    @property
    def versions_then(self) -> dict[str, str] | None:
        """Those that the result names; None while there is none, or where the job never got so far."""
        extra = self.result.extra_data if self.result is not None else None
        return (extra or {}).get("versions")

    @property
    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """By package: then and now."""
        then, now = self.versions_then or {}, self.versions_now
        return {
            name: (then.get(name, "none"), now.get(name, "none"))
            for name in sorted({*then, *now})
            if then and then.get(name) != now.get(name)
        }

    def add(self, replay: EpisodeReplay) -> None:
        self.replays.append(replay)
        if not self.quiet:
            _print(_episode_lines(replay))

    def close(self) -> None:
        """Print what all of them come to."""
        if self.quiet:
            print(to_json(self._as_json(), indent=2, inf_nan_mode="null").decode())
        else:
            _print(self._closing_lines())

    def _closing_lines(self) -> Iterator[str]:
        counts = Counter(replay.verdict for replay in self.replays)
        parts = [f"{counts[verdict]} {_counted(verdict)}" for verdict in Verdict if counts[verdict]]
        yield ""
        yield f"job {self.job.job_id}, {self.job.env_provider}/{self.job.benchmark_name}: {', '.join(parts)}"
        if self.left_out:
            yield f"{self.left_out} without an outcome yet, left out"
        yield from self._version_lines()
        if any(replay.differences and not replay.remark for replay in self.replays):
            yield self._advice()

    def _version_lines(self) -> Iterator[str]:
        if self.versions_then is None:
            yield "versions then: not known, as the job has no result that names them"
        elif not self.changed_versions:
            shown = ", ".join(f"{name} {version}" for name, version in sorted(self.versions_now.items()))
            yield f"versions: as they were then ({shown})"
        for name, (then, now) in self.changed_versions.items():
            yield f"version of {name}: {then} then, {now} now"

    def _advice(self) -> str:
        if any(one.what is Aspect.STORED_ACTIONS for replay in self.replays for one in replay.differences):
            return "Stored actions are not those that were played: somebody changed them in the database."
        if self.changed_versions:
            return "Other versions may give other numbers: replay where those of then are installed."
        return (
            "What may be the cause: other code of the benchmark, another kind of machine, or a number that "
            "somebody changed in the database."
        )

    def _as_json(self) -> dict[str, Any]:
        return {
            "job_id": self.job.job_id,
            "benchmark": f"{self.job.env_provider}/{self.job.benchmark_name}",
            "versions_then": self.versions_then,
            "versions_now": dict(self.versions_now),
            "without_outcome": self.left_out,
            "episodes": [_as_json(replay) for replay in self.replays],
        }


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(escape_control_characters(line), flush=True)


def _counted(verdict: Verdict) -> str:
    return {Verdict.EQUAL: "equal bit for bit", Verdict.DIFFERS: "different"}.get(verdict, "not replayable")


def _episode_lines(replay: EpisodeReplay) -> Iterator[str]:
    recorded = replay.recorded
    name = f"{recorded.key.task_id} #{recorded.key.episode_id}"
    if replay.verdict is Verdict.IMPOSSIBLE:
        yield f"{name}  {WORDS[replay.verdict]}: {replay.remark}"
        return
    yield f"{name}  {WORDS[replay.verdict]}  {_outcome(recorded)}"
    width = max((len(one.what) for one in replay.differences), default=0) + 1
    for one in replay.differences:
        yield f"    {one.what + ':':<{width}}  recorded {one.recorded}, now {one.now}"
    if replay.remark:
        yield f"    {replay.remark}"


def _outcome(recorded: RecordedEpisode) -> str:
    outcome = f"return {recorded.episode_return!r}, {recorded.steps} steps"
    if recorded.fault is not None:
        return f"{outcome}, then the fault {recorded.fault}"
    return f"{outcome}, {'success' if recorded.success else 'no success'}"


def _as_json(replay: EpisodeReplay) -> dict[str, Any]:
    recorded = replay.recorded
    return {
        "task_id": recorded.key.task_id,
        "episode_id": recorded.key.episode_id,
        "verdict": replay.verdict,
        "recorded": _numbers(recorded) | {"fault": recorded.fault},
        "now": None if replay.playback is None else _numbers(replay.playback),
        "differences": [one.what for one in replay.differences],
        "remark": replay.remark or None,
    }


def _numbers(outcome: RecordedEpisode | Playback) -> dict[str, Any]:
    sha256 = outcome.played_sha256 if isinstance(outcome, Playback) else outcome.action_trace_sha256
    return {
        "episode_return": outcome.episode_return,
        "steps": outcome.steps,
        "success": outcome.success,
        "terminated": outcome.terminated,
        "truncated": outcome.truncated,
        "action_trace_sha256": sha256,
    }
