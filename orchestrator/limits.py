"""What settings and a job's message together allow: the same for whoever plays an episode of the job."""

from __future__ import annotations

from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.domain.errors import UsageError
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
    """What the job's submission may use: on this machine never more than the settings say.

    Raises:
        UsageError: as `pod_limits`, where it is to run in a cluster.
    """
    if settings.containers == "kubernetes":
        return pod_limits(job, settings)
    allowed, asked = settings.container_memory_bytes, job.resources.memory_bytes
    return ContainerLimits(
        memory_bytes=min(allowed, asked) if allowed and asked else allowed or asked,
        disk_bytes=settings.container_disk_bytes,
        log_bytes=settings.container_log_bytes,
    )


def pod_limits(job: EvalJobMessage, settings: Settings) -> ContainerLimits:
    """What the job asks for its pod, within what the operator allows; None for the default.

    Raises:
        UsageError: it asks for more than that, or for an image of a repository that is not allowed.
    """
    asked = job.resources
    for what in ("cpus", "memory_bytes", "disk_bytes", "gpus"):
        wanted, most = getattr(asked, what), getattr(settings, f"kubernetes_max_{what}")
        if wanted is not None and wanted > most:
            raise UsageError(
                f"the job asks for resources.{what} = {wanted:g}, and this installation allows {most:g} "
                f"(kubernetes_max_{what})"
            )
    _check_image(job.image, settings)
    return ContainerLimits(
        memory_bytes=asked.memory_bytes,
        disk_bytes=asked.disk_bytes,
        cpus=asked.cpus,
        gpus=asked.gpus,
        log_bytes=settings.container_log_bytes,
    )


def _check_image(image: str | None, settings: Settings) -> None:
    """That a job's own image is the installation's, or of a repository that is allowed.

    It is pinned by its digest, or its message would not be valid.
    """
    if image is None or image == settings.kubernetes_image:
        return
    named, _, _ = image.partition("@")
    head, slash, last = named.rpartition("/")
    repository = f"{head}{slash}{last.partition(':')[0]}"  # a tag beside the digest says nothing
    if repository not in settings.kubernetes_allowed_images:
        allowed = ", ".join(settings.kubernetes_allowed_images) or "none"
        raise UsageError(
            f"the job asks for an image of {repository!r}; kubernetes_allowed_images allows {allowed}"
        )
