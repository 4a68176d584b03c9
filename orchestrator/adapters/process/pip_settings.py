"""What a submission host is told of this machine's package index, without the passwords."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_PASSWORD = re.compile(r"://[^/\s@]*@")
_CONFIG_VARIABLE = "PIP_CONFIG_FILE"


def pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by which pip, run by a submission host, finds packages as it does for us.

    A container's home is its own, so the file that pip would read at home is named. What holds a password is
    left out: whatever runs in a container as our own user could read it.
    """
    settings: dict[str, str] = {}
    for name, value in environ.items():
        known = name.startswith("PIP_") or name in _CERTIFICATES or name.lower() in _PROXIES
        if known and _is_harmless(name, value):
            settings[name] = value
    for path in [] if _CONFIG_VARIABLE in environ else _files_at_home(environ):
        try:
            text = path.read_text(errors="replace")
        except OSError:  # as a rule it is not there
            continue
        if _is_harmless(str(path), text):
            settings[_CONFIG_VARIABLE] = str(path)
        break
    return settings


def _is_harmless(name: str, value: str) -> bool:
    if _PASSWORD.search(value) is None:
        return True
    log.warning("pip_setting_left_out", name=name, why="it holds a password: vendor the wheels instead")
    return False


def _files_at_home(environ: Mapping[str, str]) -> Iterator[Path]:
    """Where pip looks for a user's own file, the one that counts first."""
    home = Path(os.path.expanduser("~"))
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    yield home / "Library" / "Application Support" / "pip" / "pip.conf"
    yield home / ".pip" / "pip.conf"
