"""Finds the provider of a job's benchmark: the built-in ones and those that other packages register.

A package adds a provider by an entry point of the group `orchestrator.benchmarks`, whose name is the
provider's and whose object is a `ports.BenchmarkProvider` or a class of one without arguments. No provider is
imported before it is asked for, so a simulator that is missing or broken harms only the jobs that need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any, cast

from orchestrator.adapters.benchmarks.names import unknown_name
from orchestrator.domain.errors import UsageError
from orchestrator.ports import Benchmark, BenchmarkProvider

ENTRY_POINT_GROUP = "orchestrator.benchmarks"

_BUILT_IN = {
    "gymnasium": ("orchestrator.adapters.benchmarks.gymnasium_provider", "GymnasiumProvider"),
    "metaworld": ("orchestrator.adapters.benchmarks.metaworld_provider", "MetaWorldProvider"),
}


def provider_names() -> list[str]:
    """Names of all providers, sorted. One that is named may still fail to load."""
    return sorted({*_BUILT_IN, *(entry_point.name for entry_point in _entry_points())})


def load_provider(name: str) -> BenchmarkProvider:
    """The provider of that name. A built-in one cannot be replaced by another package's.

    Raises:
        UsageError: there is none, several packages claim the name, or it cannot be loaded, with the reason.
    """
    if name in _BUILT_IN:
        module, class_name = _BUILT_IN[name]
        return cast(BenchmarkProvider, getattr(import_module(module), class_name)())
    candidates = [entry_point for entry_point in _entry_points() if entry_point.name == name]
    if not candidates:
        raise unknown_name("benchmark provider", name, provider_names())
    if len({entry_point.value for entry_point in candidates}) > 1:
        owners = ", ".join(sorted(_origin(entry_point) for entry_point in candidates))
        raise UsageError(f"the benchmark provider {name!r} is claimed by several packages: {owners}")
    return _load_foreign(candidates[0])


def load_benchmark(
    env_provider: str, benchmark_name: str, config: Mapping[str, Any], spec: Mapping[str, Any] | None
) -> Benchmark:
    """The benchmark of a job. The same arguments and versions give the same benchmark in any process.

    Raises:
        UsageError: unknown provider or benchmark (lists what there is and the nearest match), a missing
            optional dependency (says what to install), or an unusable config.
    """
    return load_provider(env_provider).load(benchmark_name, config, spec)


def _entry_points() -> metadata.EntryPoints:
    return metadata.entry_points(group=ENTRY_POINT_GROUP)


def _origin(entry_point: metadata.EntryPoint) -> str:
    package = entry_point.dist.name if entry_point.dist is not None else "an unknown package"
    return f"{entry_point.value} of {package}"


def _load_foreign(entry_point: metadata.EntryPoint) -> BenchmarkProvider:
    try:
        loaded = entry_point.load()
        provider = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:  # code of others: whatever it raises, the job cannot run
        raise UsageError(
            f"the benchmark provider {entry_point.name!r} ({_origin(entry_point)}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    missing = [
        method for method in ("benchmark_names", "load") if not callable(getattr(provider, method, None))
    ]
    if missing:
        raise UsageError(
            f"the benchmark provider {entry_point.name!r} ({_origin(entry_point)}) is none: it has no "
            f"{' and no '.join(missing)}"
        )
    return cast(BenchmarkProvider, provider)
