"""Containers as processes of this machine, as the settings say: the same for a job and for a check."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.adapters.process.launch import submission_host_command
from orchestrator.adapters.process.pip_settings import pip_settings
from orchestrator.failpoints import instrumented
from orchestrator.ports import Endpoint
from orchestrator.settings import Settings
from orchestrator.submission.preparation import EnvironmentOptions


def process_containers(
    settings: Settings, data: Path, directory: Path, watch_pid: int | None = None
) -> ProcessContainers:
    """Containers below `directory`; their submissions share the environments below `data`."""
    environments = EnvironmentOptions(
        store=data / "environments",
        timeout_seconds=settings.environment_timeout_seconds,
        keep=settings.environments_kept,
        max_bytes=settings.environments_max_bytes,
        from_index=settings.requirements_from_index,
    )
    return ProcessContainers(
        directory,
        watch_pid=watch_pid,
        command=partial(submission_host_command, environments=environments),
        pip_settings=pip_settings(os.environ) if settings.requirements_from_index else None,
    )


def submission_host(settings: Settings, endpoint: Endpoint, session_key: bytes) -> SubmissionHostClient:
    """Talks to the submission host of a container; one in a cluster has to prove its network closed first."""
    client = SubmissionHostClient(
        endpoint,
        session_key,
        environment_timeout_seconds=settings.environment_timeout_seconds,
        require_sealed=settings.containers == "kubernetes",
    )
    return instrumented(client, "host_client")
