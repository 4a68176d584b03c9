import os
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.adapters.process.processes import MARKER
from orchestrator.domain.errors import UsageError
from orchestrator.settings import ENV_PREFIX, Settings, load_settings
from orchestrator.submission.startup import KEY_VARIABLE

SECRET_URL = "postgresql://user:hunter2@host/db"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_without_any_variable_the_defaults_run_one_machine() -> None:
    settings = load_settings()

    assert settings.database_url is None
    assert (settings.max_concurrent_jobs, settings.validator_hotkey) == (2, "local")
    assert (settings.archive_allowed_schemes, settings.archive_allowed_hosts) == (("https",), ())


def test_a_variable_sets_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_LEASE_SECONDS", "12.5")
    monkeypatch.setenv("ORCHESTRATOR_ARCHIVE_ALLOWED_SCHEMES", "HTTPS, s3 ,")
    monkeypatch.setenv("ORCHESTRATOR_ARCHIVE_ALLOWED_HOSTS", "Example.org, .example.net")
    monkeypatch.setenv("ORCHESTRATOR_TELEMETRY_STEPS", "false")

    settings = load_settings()

    assert (settings.lease_seconds, settings.telemetry_steps) == (12.5, False)
    assert settings.archive_allowed_schemes == ("https", "s3")
    assert settings.archive_allowed_hosts == ("example.org", ".example.net")


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_WORKERS_PER_JOB", "3")

    assert load_settings(workers_per_job=5).workers_per_job == 5
    assert load_settings(workers_per_job=None).workers_per_job == 3


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATABASE_URL", "")

    assert load_settings().database_url is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("STEP_TIMEOUT_SECONDS", "abc", "expected a number of seconds above 0"),
        ("ARCHIVE_ALLOWED_HOSTS", "https://example.org", "expected host names like example.org"),
        ("ARCHIVE_ALLOWED_HOSTS", "*.example.org", "expected host names like example.org"),
        ("ARCHIVE_ALLOWED_HOSTS", "example.org,.", "expected host names like example.org"),
        ("STEP_TIMEOUT_SECONDS", "-1", "expected a number of seconds above 0, at most 10_000_000"),
        ("STEP_TIMEOUT_SECONDS", "inf", "expected a number of seconds above 0"),
        ("STEP_TIMEOUT_SECONDS", "nan", "expected a number of seconds above 0"),
        ("MAX_CONCURRENT_JOBS", "0", "expected a whole number from 1 to 1_000_000_000"),
        ("CONTAINER_MEMORY_BYTES", "1", "expected a whole number of bytes from 16_777_216 (16 MiB)"),
        ("VALIDATOR_HOTKEY", "x" * 257, "expected a text of 1 to 256 characters"),
        ("TELEMETRY_STEPS", "maybe", "expected true or false"),
        ("CONTAINERS", "docker", "expected one of process, kubernetes"),
        ("LOG_LEVEL", "LOUD", "expected one of DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(ENV_PREFIX + name, value)

    with pytest.raises(UsageError) as refused:
        load_settings()

    assert f"{ENV_PREFIX}{name}={value!r}"[:100] in str(refused.value)
    assert words in str(refused.value)


def test_a_wrong_option_is_named_without_the_prefix() -> None:
    with pytest.raises(UsageError, match=r"^workers_per_job=0: "):
        load_settings(workers_per_job=0)


@pytest.mark.parametrize(
    ("wrong", "right"), [("WORKERS_PER_JOBS", "WORKERS_PER_JOB"), ("DATABASEURL", "DATABASE_URL")]
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, wrong: str, right: str
) -> None:
    monkeypatch.setenv(ENV_PREFIX + wrong, "1")

    with pytest.raises(UsageError, match=f"did you mean {ENV_PREFIX}{right}"):
        load_settings()


def test_variables_of_the_submission_host_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "00" * 32)
    monkeypatch.setenv(MARKER, "installation/container")

    assert load_settings() == Settings()


def test_a_misspelt_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean workers_per_job"):
        load_settings(worker_per_job=1)


def test_secrets_show_neither_in_settings_nor_in_complaints(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(database_url=SECRET_URL)
    monkeypatch.setenv("ORCHESTRATOR_DATABASE_URL", SECRET_URL.replace("postgresql", "mysql"))

    with pytest.raises(UsageError, match="expected postgresql://") as refused:
        load_settings()

    assert "hunter2" not in f"{settings!r} {settings} {refused.value} {refused.value.__cause__}"
    assert refused.value.__suppress_context__


def test_settings_survive_the_way_into_an_actor_with_their_secrets() -> None:
    settings = load_settings(database_url=SECRET_URL, data_dir=Path("/somewhere"))

    copy = pickle.loads(pickle.dumps(settings))

    assert copy == settings
    assert copy.database_url.get_secret_value() == SECRET_URL


def test_a_pickle_ignores_the_environment_of_the_process_that_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pickled = pickle.dumps(load_settings())
    monkeypatch.setenv("ORCHESTRATOR_WORKERS_PER_JOB", "9")

    assert pickle.loads(pickled).workers_per_job == 1


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().workers_per_job = 2


def test_a_data_directory_is_absolute_whatever_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")

    assert load_settings(data_dir="here").data_dir == tmp_path / "here"
    assert load_settings(data_dir="~/there").data_dir == Path("/home/someone/there")


def test_an_episode_that_could_never_pass_the_sink_is_refused() -> None:
    with pytest.raises(UsageError, match="episode_buffer_bytes may not be above sink_queue_bytes"):
        load_settings(episode_buffer_bytes=2**27, sink_queue_bytes=2**26)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is_for(name: str) -> None:
    assert Settings.model_fields[name].description
