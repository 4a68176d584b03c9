"""Says in plain words what a submission did wrong, from what the judging code reports of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.authoring.findings import Finding, Mark
from orchestrator.authoring.playing import Played
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.errors import PolicyError, PolicyRaised, SubmissionError, SubmissionSilent
from orchestrator.ports import Evidence
from orchestrator.submission.archive import SERVER_FILE

LOADS = "loads"
PLAYS = "plays"
INSTANCES = "instances"

_PLACE = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
_EXCEPTION = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?$")
_MISSING_MODULE = re.compile(r"No module named '(?P<name>[^']+)'")
_NOT_LOADED = re.compile(r"^the submission did not load:[ \n]")
_LATE = re.compile("did not (load|serve) (within|in time)")
_RAISED = "the policy raised an exception:"
_SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
_LOG_LINES = 12
_HOST_LINE = "waiting for an archive on "  # the submission host's own
_FATAL = "Fatal Python error"
_OWN_FRAME = re.compile(r'^  File "[^/<]')

_IMPORT_ADVICE = (
    "name packages in requirements.txt beside agent.py; put modules of your own into the directory"
)
_CLASS_ADVICE = (
    "agent.py defines class Agent with act(self, observation); `submission init` writes an example"
)
_CONSTRUCTOR_ADVICE = (
    "Agent is made without arguments, apart from observation_space and action_space where it names them"
)
_LOAD_TIME_ADVICE = "load less, or faster: all that runs before the first act() counts"
_RETURN_ADVICE = "return a number, a list, a numpy array, or a dict of these: of a tensor tensor.numpy()"
_RESET_ADVICE = "it is called as reset(episode, seed), both integers"
_NON_FINITE_ADVICE = "look for a division by zero, a logarithm or an overflow in act()"
_EXIT_ADVICE = "the process has to go on until it is ended: no exit() and no os._exit()"


def load_failure(error: SubmissionError) -> Finding:
    """Why the submission cannot be evaluated at all."""
    reason = _NOT_LOADED.sub("", error.reason)
    raised = Raised.read(reason)
    if raised is None:
        return _load_failure_in_words(reason, error.log_tail)
    if raised.name in _SYNTAX_ERRORS:
        return _wrong(LOADS, f"{raised.place}the code is no valid Python: {raised.text}", raised.traceback)
    missing = _MISSING_MODULE.search(raised.text)
    if raised.name == "ModuleNotFoundError" and missing:
        text = f"{raised.place}there is no module {missing['name']} to import"
        return _wrong(LOADS, text, raised.traceback, _IMPORT_ADVICE)
    if raised.name == "TypeError" and "__init__()" in raised.text:
        return _wrong(LOADS, f"Agent cannot be made: {raised.text}", "", _CONSTRUCTOR_ADVICE)
    if raised.name == "SystemExit":
        text = f"{raised.place}the code asked to exit while it was loaded"
        return _wrong(LOADS, text, raised.traceback, _EXIT_ADVICE)
    return _wrong(LOADS, f"{raised.place}the code raised {raised.name} while it was loaded", raised.traceback)


def silence(error: SubmissionSilent) -> Finding:
    """That the submission runs, and does not answer; here there is no network that could have lost a word."""
    return _wrong(LOADS, f"it took its archive, and then did not answer as its server should: {error}")


def _load_failure_in_words(text: str, log_tail: str) -> Finding:
    reason, _, rest = text.partition("\n")
    if _LATE.search(reason):
        return _wrong(LOADS, reason, rest or last_words(log_tail), _LOAD_TIME_ADVICE)
    if reason.startswith(SERVER_FILE):
        return _wrong(LOADS, reason, rest or last_words(log_tail))
    if "ended before" in reason:
        return _wrong(LOADS, reason, last_words(log_tail), _EXIT_ADVICE if "exit" in reason else "")
    return _wrong(LOADS, reason, rest, _CLASS_ADVICE if "class Agent" in reason else "")


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of the submission's, as its traceback tells it."""

    name: str
    text: str
    place: str  # "agent.py, line 3: ", or "" where no frame is the submission's
    traceback: str

    @classmethod
    def read(cls, traceback: str) -> Raised | None:
        """The exception at the end of `traceback`; None where there is none."""
        lines = traceback.rstrip("\n").splitlines()
        for index in range(len(lines) - 1, -1, -1):  # its text may have several lines
            found = None if lines[index].startswith(" ") else _EXCEPTION.match(lines[index])
            if found and (found["text"] is not None or index == len(lines) - 1):
                break
        else:
            return None
        text = "\n".join([found["text"] or "", *lines[index + 1 :]]).strip()
        places = _PLACE.findall(traceback)
        place = f"{places[-1][0]}, line {places[-1][1]}: " if places else ""
        return cls(found["name"], text, place, traceback if places else "\n".join(lines[index:]))


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known besides the report of a run that failed.

    `when` tells a repetition from the first run. `evidence` is None where nothing is known of the process
    that serves the policy.
    """

    limits: EpisodeLimits
    action_space: str
    when: str = ""
    evidence: Evidence | None = None
    log_tail: str = ""


def episode_failure(played: Played, circumstances: Circumstances) -> Finding:
    """What went wrong in an episode that the submission did not play to its end."""
    report, evidence, log_tail = played.report, circumstances.evidence, circumstances.log_tail
    place = report.place or "the start"
    what = report.detail.removeprefix(f"{report.place}: ")
    named = [f"episode {played.episode.episode_id} of {played.episode.task_id}", circumstances.when, place]
    episode = f"{', '.join(part for part in named if part)}: "
    if evidence is not None and not evidence.running:
        text = f"{episode}the process ended: {evidence.reason}"
        return _wrong(PLAYS, text, last_words(log_tail), _EXIT_ADVICE if evidence.exit_code == 0 else "")
    match report.finished and report.finished.fault:
        case FaultClass.POLICY_EXCEPTION:
            return _raised_in_an_episode(episode, what.removeprefix(_RAISED).strip("\n"))
        case FaultClass.NON_FINITE_ACTION:
            return _wrong(PLAYS, episode + what, advice=_NON_FINITE_ADVICE)
        case FaultClass.INVALID_ACTION:
            nothing = "act() ended without a return: " if what.endswith("got None") else ""
            return _wrong(
                PLAYS, episode + what, advice=f"{nothing}act() has to return {circumstances.action_space}"
            )
        case FaultClass.STEP_TIMEOUT:
            return _late(episode, place, circumstances)
        case FaultClass.PROTOCOL_ERROR:
            return _wrong(PLAYS, episode + what, advice="docs/protocol.md says what an answer looks like")
    return _wrong(PLAYS, episode + what, last_words(log_tail))


def _raised_in_an_episode(episode: str, traceback: str) -> Finding:
    raised = Raised.read(traceback)
    if raised is None:
        return _wrong(PLAYS, f"{episode}the policy answered with an error", traceback)
    if raised.text.endswith("cannot be sent"):
        return _wrong(PLAYS, f"{episode}the answer cannot be sent: {raised.text}", advice=_RETURN_ADVICE)
    advice = _RESET_ADVICE if raised.text.startswith("Agent.reset()") else ""
    return _wrong(PLAYS, f"{episode}the policy raised {raised.name}", raised.traceback, advice)


def _late(episode: str, place: str, circumstances: Circumstances) -> Finding:
    limits = circumstances.limits
    if place == "reset":
        text = f"reset() did not return within {limits.reset_timeout_seconds:g} s"
        advice = "do what takes long in the constructor, once"
    else:
        text = f"no answer within {limits.step_timeout_seconds:g} s, the deadline of a step"
        advice = "an episode with a late answer is a failure, and the process is replaced"
    return _wrong(PLAYS, episode + text, last_words(circumstances.log_tail), advice)


def connection_failure(error: PolicyError) -> Finding:
    """Why no further connection could be opened, and so no other instance of the policy was to be had."""
    if not isinstance(error, PolicyRaised):
        return _wrong(INSTANCES, f"another connection could not be opened: {error}")
    raised = Raised.read(str(error))
    advice = "each rollout worker gets an instance of its own, all of them in one process"
    if raised is None:
        return _wrong(INSTANCES, "Agent cannot be made a second time", str(error), advice)
    return _wrong(INSTANCES, f"Agent cannot be made a second time: {raised.name}", raised.traceback, advice)


def last_words(log: str) -> str:
    """What the submission printed last, with a line that says so; "" where there is nothing.

    Of a crash that Python itself noted, only where in the submission it happened.
    """
    lines = [line for line in log.strip().splitlines() if not line.startswith(_HOST_LINE)]
    fatal = next((index for index, line in enumerate(lines) if line.startswith(_FATAL)), None)
    if fatal is not None:
        return "\n".join(_crash(lines[fatal:]))
    lines = lines[-_LOG_LINES:]
    return "\n".join(["the last that it printed:", *lines]) if lines else ""


def _crash(lines: list[str]) -> list[str]:
    """The error and the submission's frames of the thread that it happened in."""
    kept = [lines[0]]
    threads = "\n".join(lines[1:]).split("\n\n")
    current = next((thread for thread in threads if "Current thread" in thread), "")
    # Those of the submission have relative paths here; the others are of the interpreter and the server.
    return kept + [line for line in current.splitlines() if _OWN_FRAME.match(line)]


def _wrong(name: str, text: str, detail: str = "", advice: str = "") -> Finding:
    return Finding(Mark.WRONG, name, text, detail=detail, advice=advice)
