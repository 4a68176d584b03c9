"""What settings and a job's message together allow: the same for whoever plays an episode of the job."""

from __future__ import annotations

from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import ContainerLimits
from orchestrator.settings import Settings


def episode_limits(job: EvalJobMessage, settings: Settings) -> EpisodeLimits:
    """Deadlines and lengths of the job's episodes: its own config goes before the settings."""
    config = job.job_config
    return EpisodeLimits(
        step_timeout_seconds=config.step_timeout_seconds or settings.step_timeout_seconds,
        episode_timeout_seconds=config.episode_timeout_seconds or settings.episode_timeout_seconds,
        reset_timeout_seconds=settings.reset_timeout_seconds,
        max_steps=config.max_episode_steps,
        action_horizon=config.action_horizon,
        clips=(config.out_of_bounds_actions or settings.out_of_bounds_actions) == "clip",
    )


def container_limits(job: EvalJobMessage, settings: Settings) -> ContainerLimits:
    """What the job's submission may use: of memory what it asks for, but never more than the settings say."""
    allowed, asked = settings.container_memory_bytes, job.resources.memory_bytes
    return ContainerLimits(
        memory_bytes=min(allowed, asked) if allowed and asked else allowed or asked,
        disk_bytes=settings.container_disk_bytes,
        log_bytes=settings.container_log_bytes,
    )
