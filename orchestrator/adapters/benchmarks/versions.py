"""The versions that decide a benchmark's numbers, for the result."""

from __future__ import annotations

import platform
from importlib import metadata


def versions_of(*packages: str) -> dict[str, str]:
    """Version by name of Python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
