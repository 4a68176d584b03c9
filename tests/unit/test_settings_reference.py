from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.settings import Settings
from orchestrator.settings_reference import (
    REGENERATE,
    describe_settings,
    settings_by_section,
    settings_page,
    value_in_words,
)

ROOT = Path(__file__).resolve().parents[2]
DESCRIBED = describe_settings(Settings)


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs/settings.md").read_text()

    assert page == settings_page(Settings), f"docs/settings.md is not current: run `{REGENERATE}`"


def test_every_setting_stands_in_a_section() -> None:
    sections = settings_by_section(Settings)

    assert "" not in sections
    assert [one.name for settings in sections.values() for one in settings] == list(Settings.model_fields)


@pytest.mark.parametrize("name", DESCRIBED)
def test_every_setting_says_what_it_is_and_what_is_allowed(name: str) -> None:
    setting = DESCRIBED[name]

    assert setting.text.endswith(".")
    assert setting.allowed
    assert "JSON of type" not in setting.allowed, "teach settings_reference this kind of setting"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lease_seconds", 30.0, "30"),
        ("lease_seconds", 0.25, "0.25"),
        ("lease_seconds", 5400.0, "5400 (1.5 h)"),
        ("lease_seconds", 604_800.0, "604_800 (7 d)"),
        ("archive_max_bytes", 1536, "1536 (1.5 KiB)"),
        ("archive_max_bytes", 100, "100"),
        ("retention_rows", 1_000_000, "1_000_000"),
        ("telemetry_steps", True, "true"),
        ("archive_allowed_hosts", (), "none"),
        ("archive_allowed_hosts", ("a", "b"), "a, b"),
        ("data_dir", None, "not set"),
    ],
)
def test_values_are_shown_with_a_larger_unit_where_they_are_large(
    name: str, value: object, words: str
) -> None:
    assert value_in_words(name, value) == words


def test_the_settings_that_hold_a_secret_are_marked_so() -> None:
    secrets = [name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)]

    assert [name for name, setting in DESCRIBED.items() if setting.secret] == secrets
    assert "database_url" in secrets
