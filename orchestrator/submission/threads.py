"""Keeps numeric libraries from starting a thread for every core of a machine that they have a part of."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "PYTHON_CPU_COUNT",  # what os.cpu_count() says, from Python 3.13 on; before, it says the machine's
)
_CGROUPS = Path("/sys/fs/cgroup")


def limit_threads(environ: MutableMapping[str, str], cgroups: Path = _CGROUPS) -> None:
    """Set what is not set yet to the whole CPUs, at least one, that this container may use, if it is limited.

    To be called before such a library is imported.
    """
    cpus = cpu_limit(cgroups)
    if cpus is not None:
        for name in THREAD_VARIABLES:
            environ.setdefault(name, str(max(1, int(cpus))))


def cpu_limit(cgroups: Path = _CGROUPS) -> float | None:
    """CPUs that the kernel gives to this container at most; None where it does not say."""
    quota, period = _second_version(cgroups) or _first_version(cgroups) or ("max", "1")
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", and an empty file
        return None
    return cpus if cpus > 0 else None  # -1 is no limit, in the first version


def _second_version(cgroups: Path) -> tuple[str, str] | None:
    parts = (_read(cgroups / "cpu.max") or "").split()
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _first_version(cgroups: Path) -> tuple[str, str] | None:
    quota, period = (_read(cgroups / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return None if quota is None or period is None else (quota, period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
