import json
import logging
import math
import sys

import pytest

from orchestrator import logging as orchestrator_logging
from orchestrator.logging import (
    MAX_ITEMS,
    MAX_TEXT_CHARS,
    bind_process,
    configure_logging,
    get_logger,
    job_context,
    mask_secrets,
)


@pytest.fixture(autouse=True)
def no_fields_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator_logging, "_process_fields", {})


class Stderr:
    """What was written to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    @property
    def text(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text

    @property
    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Stderr:
    return Stderr(capsys)


def test_where_no_terminal_is_each_event_is_a_line_of_json(stderr: Stderr) -> None:
    configure_logging()

    get_logger(component="sink").info("rollout_finished", seconds=1.5)

    (line,) = stderr.lines
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["event"], line["seconds"], line["component"]) == ("rollout_finished", 1.5, "sink")


def test_on_a_terminal_events_are_text(stderr: Stderr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    configure_logging()
    get_logger().info("rollout_finished")

    assert "rollout_finished" in stderr.text
    assert not stderr.text.startswith("{")


def test_a_logger_made_before_the_set_up_obeys_it(stderr: Stderr) -> None:
    early = get_logger()

    configure_logging("json", "WARNING")
    early.info("unseen")
    early.warning("seen")

    assert [line["event"] for line in stderr.lines] == ["seen"]


def test_the_job_is_bound_for_a_block_or_for_the_whole_process(stderr: Stderr) -> None:
    configure_logging("json")
    log = get_logger()

    with job_context(4):
        log.info("inside")
    log.info("outside")
    bind_process(job_id=7)
    log.info("supervised")

    assert [line.get("job_id") for line in stderr.lines] == [4, None, 7]


def test_other_packages_log_in_the_same_form_from_warning_on(stderr: Stderr) -> None:
    configure_logging("json")
    bind_process(job_id=7)

    logging.getLogger("pgqueuer").info("unseen")
    logging.getLogger("pgqueuer").warning("lost %s", "postgresql://u:hunter2@h/db")

    (line,) = stderr.lines
    assert (line["event"], line["logger"], line["job_id"]) == ("lost postgresql://u:***@h/db", "pgqueuer", 7)


def test_setting_up_twice_does_not_write_twice(stderr: Stderr) -> None:
    configure_logging("json")
    configure_logging("json")

    logging.getLogger("pgqueuer").warning("once")

    assert len(stderr.lines) == 1


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:hunter2@host:5432/db",
        "postgresql://user:hunter2@hunter2/@host/db?sslmode=require",
        "could not connect to 'postgres://u:hunter2@h/d' (refused)",
        "host=h user=u password=hunter2 dbname=d",
        "host=h password='hunter2 hunter2'",
        '{"password": "hunter2"}',
        "https://bucket/key?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2&x=1",
        "https://account.blob/key?sv=1&sig=hunter2%3D",
        "Authorization: Bearer hunter2.hunter2",
    ],
)
def test_secrets_inside_text_are_masked(text: str) -> None:
    assert "hunter2" not in mask_secrets(text)


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:8000/health", "a@b.example wrote", "task=reach-v3 episode=4", "10:30 to 11:45"]
)
def test_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert mask_secrets(text) == text


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_show_nowhere_in_a_line(stderr: Stderr, form: str) -> None:
    configure_logging(form)
    log = get_logger()

    log.info(
        "started",
        session_key=b"hunter2",
        settings={"nested": [{"db_password": "hunter2"}]},
        error=ConnectionError("postgresql://u:hunter2@h/d"),
    )
    try:
        raise ConnectionError("postgresql://u:hunter2@h/d")
    except ConnectionError:
        log.exception("failed")

    assert stderr.text.count("***") >= 4
    assert "hunter2" not in stderr.text.replace('u:hunter2@h/d")', "")  # the source line of this test
    assert "ConnectionError" in stderr.text


def test_payloads_are_cut_and_say_how_much_is_gone(stderr: Stderr) -> None:
    configure_logging("json")

    get_logger().info("received", payload=b"x" * 10**6, text="y" * 10**6, items=list(range(1000)))

    (line,) = stderr.lines
    assert len(str(line["text"])) < MAX_TEXT_CHARS + 100
    assert "characters" in str(line["text"])
    assert len(str(line["payload"])) < MAX_TEXT_CHARS + 100
    assert line["items"] == [*range(MAX_ITEMS), "... 950 more"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_what_a_submission_printed_cannot_drive_the_terminal(stderr: Stderr, form: str) -> None:
    configure_logging(form)

    get_logger().info("crashed", output="\x1b[2J\x9b31m\r\u202edlrow")

    assert not set("\x1b\x9b\r\u202e") & set(stderr.text)


def test_numbers_that_are_not_finite_leave_the_line_valid_json(stderr: Stderr) -> None:
    configure_logging("json")

    get_logger().info("stepped", reward=math.nan, returns=[math.inf])

    (line,) = stderr.lines
    assert (line["reward"], line["returns"]) == ("nan", ["inf"])
