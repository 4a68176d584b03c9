"""Settings from flags, a file and variables: which one counts, and what a person reads when one is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.settings import ENV_PREFIX, Settings, load_settings, settings_in_effect
from orchestrator.settings_sources import FILE_VARIABLE, Given, Source, given_by_assignments
from tests.golden_texts import check_golden
from tests.in_process_cli import run_cli

SECRET = "hunter2"
GOOD_URL = f"postgresql://user:{SECRET}@host/db"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A settings file in the working directory, where it is called by its bare name."""
    monkeypatch.chdir(tmp_path)
    return Path("lab.toml")


def assigned(*assignments: str) -> dict[str, Given]:
    return given_by_assignments(assignments, Settings.model_fields)


# ------------------------------------------------------------------------------------- which one counts


@pytest.mark.parametrize(
    ("by_flag", "by_file", "by_variable", "expected", "source"),
    [
        ("4", 3, "2", 4, Source.FLAG),
        (None, 3, "2", 3, Source.FILE),
        (None, None, "2", 2, Source.VARIABLE),
        (None, None, None, 1, None),
        ("4", None, "2", 4, Source.FLAG),
        ("", 3, "2", 1, None),  # empty: the default
        (None, '""', "2", 1, None),
        (None, None, "", 1, None),
    ],
)
def test_flags_win_over_the_file_the_file_over_variables_and_those_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    by_flag: str | None,
    by_file: object,
    by_variable: str | None,
    expected: int,
    source: Source | None,
) -> None:
    if by_variable is not None:
        monkeypatch.setenv("ORCHESTRATOR_WORKERS_PER_JOB", by_variable)
    file.write_text("" if by_file is None else f"workers_per_job = {by_file}\n")
    flags = {} if by_flag is None else assigned(f"workers_per_job={by_flag}")

    found = settings_in_effect(flags, file)

    assert found.settings.workers_per_job == expected
    given = found.given.get("workers_per_job")
    assert (given and given.source) == source


def test_the_variable_names_the_file_unless_the_command_names_one(
    monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
) -> None:
    file.write_text("workers_per_job = 2\n")
    (tmp_path / "other.toml").write_text("workers_per_job = 3\n")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "other.toml"))

    assert load_settings().workers_per_job == 3
    assert settings_in_effect({}, file).settings.workers_per_job == 2


def test_of_two_assignments_the_later_counts_and_an_option_of_its_own_above_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    ran = run_cli(
        "settings", "--json", "--set", "data_dir=a", "--set", "lease_seconds=5", "--set", "lease_seconds=6",
        "--data-dir", "b",
    )  # fmt: skip

    shown = json.loads(ran.stdout)
    assert shown["data_dir"] == {"value": str(tmp_path / "b"), "source": "flag", "place": "--data-dir"}
    assert shown["lease_seconds"]["value"] == 6.0


def test_a_file_has_the_types_of_toml_and_paths_that_start_at_its_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    directory = tmp_path / "lab"
    directory.mkdir()
    (directory / "a.toml").write_text(
        'data_dir = "data"\nlease_seconds = 12\ntelemetry_steps = false\n'
        'archive_allowed_hosts = ["Example.org", " .example.net"]\n'
    )
    (directory / "b.toml").write_text('data_dir = "~/data"\n')

    settings = settings_in_effect({}, directory / "a.toml").settings

    assert settings.data_dir == directory / "data"
    assert (settings.lease_seconds, settings.telemetry_steps) == (12.0, False)
    assert settings.archive_allowed_hosts == ("example.org", ".example.net")
    assert settings_in_effect({}, directory / "b.toml").settings.data_dir == Path("/home/someone/data")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_can_be_given_as_a_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings.model_fields[name].default
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    others = {"database_url": GOOD_URL, "data_dir": "/data", "kubernetes_image": f"a@sha256:{'0' * 64}"}
    text = others.get(name, "2000000000" if default is None else text)

    by_flag = settings_in_effect(assigned(f"{name}={text}")).settings
    monkeypatch.setenv(f"{ENV_PREFIX}{name.upper()}", text)

    assert getattr(by_flag, name) == getattr(load_settings(), name)
    assert default is None or getattr(by_flag, name) == default


# --------------------------------------------------------------------------------- what a person reads

WRONG = {
    "variable_out_of_range": ({"LEASE_SECONDS": "0.5"}, "", ()),
    "variable_misspelt": ({"LEASE_SECOND": "5"}, "", ()),
    "variable_of_the_file_misspelt": ({"SETTING_FILE": "lab.toml"}, "", ()),
    "file_out_of_range": ({}, "workers_per_job = 0\n", ()),
    "file_wrong_type": ({}, 'max_concurrent_jobs = "many"\n', ()),
    "file_true_for_a_number": ({}, "max_concurrent_jobs = true\n", ()),
    "file_list_of_numbers": ({}, "archive_allowed_hosts = [1, 2]\n", ()),
    "file_unknown_key": ({}, "lease_secs = 5\n", ()),
    "file_key_as_a_variable": ({}, "ORCHESTRATOR_LEASE_SECONDS = 5\n", ()),
    "file_table": ({}, "[telemetry]\nsteps = false\n", ()),
    "file_twice_the_same_key": ({}, "lease_seconds = 5\nlease_seconds = 6\n", ()),
    "file_no_quotes": ({}, "lease_seconds = 5\nlog_level = DEBUG\n", ()),
    "file_cut_short": ({}, 'log_level = "DEBUG', ()),
    "file_not_utf_8": ({}, b"log_level = '\xff'\n", ()),
    "file_missing": ({}, "", ("--settings", "nowhere.toml")),
    "file_is_a_directory": ({}, "", ("--settings", ".")),
    "flag_wrong_choice": ({}, "", ("--set", "log_level=loud")),
    "flag_unknown": ({}, "", ("--set", "lease_second=5")),
    "flag_without_a_value": ({}, "", ("--set", "lease_seconds")),
    "flag_wrong_host": ({}, "", ("--set", "archive_allowed_hosts=https://example.org")),
    "option_wrong_url": ({}, "", ("--database-url", f"mysql://user:{SECRET}@host/db")),
    "two_that_do_not_fit": ({"EPISODE_BUFFER_BYTES": "99999999"}, "", ()),
    "several_at_once": ({"LEASE_SECONDS": "x"}, "workers_per_job = 0\n", ("--set", "log_level=loud")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place_its_value_and_what_is_allowed(
    case: str, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    variables, content, arguments = WRONG[case]
    for name, value in variables.items():
        monkeypatch.setenv(ENV_PREFIX + name, value)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    named = () if "--settings" in arguments else ("--settings", file)

    ran = run_cli("settings", *named, *arguments)

    assert (ran.code, ran.stdout) == (2, "")
    check_golden("settings", case, ran.stderr)


def test_a_settings_file_that_may_not_be_read_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("lease_seconds = 5\n")
    denied = PermissionError(13, "Permission denied")  # root may read everything
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(denied))

    ran = run_cli("settings", "--settings", file)

    assert (ran.code, ran.stderr) == (
        2,
        "error: the settings file lab.toml cannot be read: Permission denied\n",
    )


def test_the_settings_in_effect_are_shown_with_their_places(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATABASE_URL", GOOD_URL)
    file.write_text('validator_hotkey = "lab"\narchive_allowed_hosts = ["a.org", "b.org"]\n')

    ran = run_cli("settings", "--settings", file, "--set", "container_memory_bytes=1073741824")

    assert ran.code == 0
    named = [line for line in ran.stdout.splitlines() if re.search("variable|file|flag", line)]
    check_golden("settings", "in_effect", re.sub(r"(?<=\S) {2,}", "  ", "\n".join(named)))


def test_the_json_has_every_setting_with_value_source_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_LEASE_SECONDS", "12")

    shown = json.loads(run_cli("settings", "--json").stdout)

    assert list(shown) == list(Settings.model_fields)
    assert shown["lease_seconds"] == {
        "value": 12.0,
        "source": "variable",
        "place": "ORCHESTRATOR_LEASE_SECONDS",
    }
    assert shown["database_url"] == {"value": None, "source": "default", "place": None}


# ----------------------------------------------------------------------------------------------- secrets

URL = f"postgresql://user:{SECRET}@host/db"
WITH_A_SECRET = [
    # A good URL beside something wrong; a wrong URL; a URL in the wrong place or under a wrong name.
    ({"DATABASE_URL": URL}, "", ("--set", "lease_seconds=0")),
    ({"DATABASE_URL": URL}, "", ("--set", "episode_buffer_bytes=99999999")),
    ({}, f'database_url = "{URL}"\nlease_seconds = 0\n', ()),
    ({}, "", ("--database-url", URL, "--set", "lease_seconds=0")),
    ({}, "", ("--set", f"database_url={URL}", "--set", "lease_seconds=0")),
    ({"DATABASE_URL": URL.replace("postgresql", "mysql")}, "", ()),
    ({}, f'database_url = "{URL.replace("postgresql", "mysql")}"\n', ()),
    ({}, f'database_url = ["{URL}"]\n', ()),
    ({}, "", ("--database-url", f"user:{SECRET}@host/db")),
    ({}, "", ("--set", f"database_url=user:{SECRET}@host")),
    ({"DATABASE_URLS": URL}, "", ()),
    ({}, f'database_urls = "{URL}"\n', ()),
    ({}, "", ("--set", f"database_urls={URL}")),
    ({}, "", ("--set", URL)),
    ({}, "", ("--set", f"{URL}?sslmode=disable")),
    ({"LOG_LEVEL": URL}, "", ()),
    ({}, f'log_level = "{URL}"\n', ()),
    ({}, "", ("--set", f"lease_seconds={URL}")),
    ({}, f'lease_seconds = "{URL}"\n', ()),
    ({}, f"database_url = {URL}\n", ()),
    ({}, f'database_url = "{URL}\n', ()),
    ({}, f'"{URL}" = 1\n', ()),
    ({}, f'["{URL}"]\na = 1\n', ()),
    ({"SETTINGS_FILE": "nowhere.toml", "DATABASE_URL": URL}, "", ()),
    ({"DATABASE_URL": URL}, "", ()),  # nothing is wrong
]


@pytest.mark.parametrize("how", [(), ("--debug",), ("--json",)], ids=["plain", "debug", "json"])
@pytest.mark.parametrize(("variables", "content", "arguments"), WITH_A_SECRET)
def test_nothing_that_is_printed_has_the_secret(
    variables: dict[str, str],
    content: str,
    arguments: tuple[str, ...],
    how: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(ENV_PREFIX + name, value)
    file.write_text(content)

    ran = run_cli("settings", *(("--settings", file) if content else ()), *arguments, *how)

    assert ran.code in (0, 2)
    assert ran.printed
    assert SECRET not in ran.printed


def test_settings_themselves_never_give_the_secret_away() -> None:
    found = settings_in_effect(assigned(f"database_url={URL}"))

    printed = f"{found!r} {found} {found.settings.model_dump_json()} {found.settings.model_dump()}"

    assert SECRET not in printed
    assert found.settings.database_url is not None
    assert found.settings.database_url.get_secret_value() == URL


def test_a_command_that_fails_later_with_debug_does_not_print_the_secret(postgres_server: Database) -> None:
    address = urlsplit(postgres_server.dsn)
    url = f"postgresql://orchestrator:{SECRET}@127.0.0.1:{address.port}/orchestrator?sslmode=disable"

    ran = run_cli("db", "migrate", "--debug", "--database-url", url)

    assert ran.code == 3
    assert "Traceback" in ran.stderr
    assert "password authentication failed" in ran.stderr
    assert SECRET not in ran.printed


def test_a_wrong_setting_is_one_line_without_a_traceback(file: Path) -> None:
    file.write_text("lease_seconds = 0\n")

    ran = run_cli("settings", "--settings", file)

    assert re.fullmatch(r"error: [^\n]+\n", ran.stderr)
