"""What a submission host is told of where packages come from, and what it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.adapters.process.pip_settings import pip_settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_settings_of_pip_proxies_and_certificates_are_handed_over_and_nothing_else(home: Path) -> None:
    known = {
        "PIP_INDEX_URL": "https://index.example.org/simple",
        "https_proxy": "http://proxy.example.org:3128",
        "NO_PROXY": "localhost",
        "SSL_CERT_FILE": "/etc/company.pem",
    }

    assert pip_settings({**known, "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x"}) == known


@pytest.mark.parametrize("name", ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "HTTPS_PROXY"])
def test_what_holds_a_password_is_left_out(home: Path, name: str) -> None:
    value = "https://fine.example.org https://user:secret@index.example.org/simple"

    assert pip_settings({name: value, "PIP_TIMEOUT": "9"}) == {"PIP_TIMEOUT": "9"}


def test_the_users_own_file_is_named_unless_another_one_is(home: Path) -> None:
    file = home / ".config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text("[global]\nindex-url = https://index.example.org/simple\n")

    assert pip_settings({}) == {"PIP_CONFIG_FILE": str(file)}
    assert pip_settings({"PIP_CONFIG_FILE": "/other"}) == {"PIP_CONFIG_FILE": "/other"}
    moved = home / "elsewhere" / "pip" / "pip.conf"
    moved.parent.mkdir(parents=True)
    file.rename(moved)
    assert pip_settings({"XDG_CONFIG_HOME": str(home / "elsewhere")}) == {"PIP_CONFIG_FILE": str(moved)}


def test_a_users_file_with_a_password_is_not_named(home: Path) -> None:
    (home / ".pip").mkdir()
    (home / ".pip" / "pip.conf").write_text("[global]\nindex-url = https://u:secret@index.example.org/\n")

    assert pip_settings({}) == {}
