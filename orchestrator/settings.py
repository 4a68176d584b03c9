"""What an operator may set, by flags, a file and `ORCHESTRATOR_*` variables; read once, by `app.py`.

Everything else takes plain arguments. Actors receive the object itself: it pickles, secrets included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from orchestrator.domain.preflight import Unsafe
from orchestrator.settings_loading import SettingsInEffect, in_effect
from orchestrator.settings_sources import ENV_PREFIX, Given, Source

__all__ = ["ENV_PREFIX", "Settings", "load_settings", "settings_in_effect"]

Seconds = Annotated[float, Field(gt=0, le=10_000_000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, Field(ge=1, le=2**50)]

_LABEL_KEY = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?"
_LABEL_VALUE = r"([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?"


def _postgres_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    return value


def _host_entry(value: str) -> str:
    if not value.strip(".") or any(character in value for character in "*/:@ "):
        raise ValueError("expected host names like example.org, or .example.org for all names below it")
    return value


def _object_name(value: str) -> str:
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value) is None:
        raise ValueError("expected a name of Kubernetes: lower-case letters, digits and hyphens")
    return value


def _node_label(value: str) -> str:
    if re.fullmatch(rf"{_LABEL_KEY}={_LABEL_VALUE}", value) is None:
        raise ValueError("expected labels of nodes like pool=submissions")
    return value


def _taint(value: str) -> str:
    effects = "NoSchedule|PreferNoSchedule|NoExecute"
    if re.fullmatch(rf"{_LABEL_KEY}(={_LABEL_VALUE})?(:({effects}))?", value) is None:
        raise ValueError("expected taints of nodes like pool=submissions:NoSchedule")
    return value


def _unsafe_finding(value: str) -> str:
    if value not in list(Unsafe):
        raise ValueError(f"expected names of findings: {', '.join(Unsafe)}")
    return value


_NodeLabel = Annotated[str, AfterValidator(_node_label)]
_Taint = Annotated[str, AfterValidator(_taint)]
_UnsafeFinding = Annotated[str, AfterValidator(_unsafe_finding)]
_HostEntry = Annotated[str, AfterValidator(_host_entry)]


class Settings(BaseSettings):
    """One installation's settings. Variable names are `ORCHESTRATOR_` and the field's name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    # ------------------------------------------------------------------------------ the installation

    database_url: Annotated[SecretStr, AfterValidator(_postgres_url)] | None = None
    """PostgreSQL of the installation, as a URL; without one an embedded server is started."""

    data_dir: Path | None = None
    """Directory of the embedded PostgreSQL and of scratch files; by default the user's data directory."""

    validator_hotkey: Annotated[str, Field(min_length=1, max_length=256)] = "local"
    """Identity of this installation in every result and status message."""

    containers: Literal["process", "kubernetes"] = "process"
    """Where submissions run: `process` is a child process on this machine, for trusted code; `kubernetes` is
    a hardened pod of a cluster, with the settings `kubernetes_*`."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """`json` lines or readable `console` text; `auto` is `console` on a terminal."""

    # ------------------------------------------------------------------------------- jobs and leases

    max_concurrent_jobs: Count = 2
    """Jobs that may be STARTING or RUNNING at once."""

    workers_per_job: Annotated[int, Field(ge=1, le=1024)] = 1
    """Rollout workers of a job that does not say how many it wants."""

    cpus_per_worker: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 1.0
    """Ray CPUs that each rollout worker reserves, unless the job says."""

    lease_seconds: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 30.0
    """How long a claim holds without renewal; it is renewed every third."""

    control_resource: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Custom resource of Ray by whose name the nodes of the control plane are known (on KubeRay the control
    group): consumer, sink, supervisors and the replicas of Serve run there, rollout workers need not. Without
    one they run anywhere."""

    cluster_autoscales: bool = False
    """Whether the Ray cluster adds nodes for what waits: a job that no present node has room for then waits
    for one, up to its deadline, and does not fail at once."""

    drain_seconds: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 10.0
    """Time for episodes under way to come to their end when the control plane stops or is replaced; what is
    cut short then runs again later, with the same seeds."""

    reconcile_interval_seconds: Seconds = 15.0
    """Time between two rounds of the reconciler."""

    client_lease_seconds: Seconds = 60.0
    """An ad-hoc job is cancelled once its client has been silent for so long."""

    max_claims_without_progress: Count = 5
    """A job is FAILED when so many claims in a row brought no new outcome."""

    # ------------------------------------------------------------------------------------- deadlines

    job_timeout_seconds: Seconds = 3600.0
    """Deadline of a job that names none, counted from its first claim."""

    start_up_timeout_seconds: Seconds = 120.0
    """Time for a container to take its archive and for its policy to answer."""

    environment_timeout_seconds: Seconds = 600.0
    """Time to make the environment of a submission that has a requirements.txt, besides start-up time."""

    connect_timeout_seconds: Seconds = 10.0
    """Time to open one connection to a policy, handshake included."""

    reset_timeout_seconds: Seconds = 30.0
    """Time for a policy's reset."""

    step_timeout_seconds: Seconds = 30.0
    """Time for a policy's reply to one observation, unless the job says."""

    episode_timeout_seconds: Seconds = 3600.0
    """Time for one episode, unless the job says."""

    # ------------------------------------------------------------------------------------ submissions

    out_of_bounds_actions: Literal["clip", "fault"] = "clip"
    """What becomes of actions out of a Box space's bounds, unless the job says: `clip` moves them to the
    bounds and counts them, `fault` fails the episode."""

    max_containers_per_job: Count = 10
    """Episodes of a job that may end or hang the submission's container before the job is FAILED."""

    archive_max_bytes: Bytes = 2 * 2**30
    """Largest submission archive that is fetched."""

    archive_fetch_timeout_seconds: Seconds = 300.0
    """Time to fetch a submission archive."""

    archive_allowed_schemes: Annotated[tuple[str, ...], NoDecode] = ("https",)
    """URL schemes that archives may have, comma-separated; local jobs may use `file` besides. Object stores,
    like `s3`, need their fsspec package, and are read with this machine's credentials for every job."""

    archive_allowed_hosts: Annotated[tuple[_HostEntry, ...], NoDecode] = ()
    """Hosts (for object stores: buckets) that archives may come from, comma-separated, `.example.org` for all
    names below it; by default every public one."""

    archive_private_hosts: Annotated[tuple[_HostEntry, ...], NoDecode] = ()
    """Hosts that may have private addresses, comma-separated: an artifact store in the cluster, say.
    All others have to be public, so that no job can have anything inside the network fetched."""

    archive_ca_file: Path | None = None
    """PEM file of the certificate authorities that archives' hosts are checked against, in the place of the
    public ones."""

    environments_kept: Count = 10
    """Environments of submissions that are kept on a machine; those used longest ago are removed first."""

    environments_max_bytes: Bytes = 20 * 2**30
    """Disk that all environments of submissions on a machine may take together."""

    requirements_from_index: bool = True
    """Whether a submission's requirements may come from a package index, as pip is set up here; otherwise
    only from the wheels in its archive."""

    container_memory_bytes: Annotated[int, Field(ge=16 * 2**20)] | None = None
    """Memory that a submission may use, unless the job asks for less."""

    container_disk_bytes: Bytes | None = None
    """Disk that a submission may use, its unpacked archive included."""

    container_log_bytes: Bytes = 4 * 2**20
    """How much of a submission's output is kept."""

    # ------------------------------------------------------------------------------------ kubernetes

    kubernetes_config_file: Path | None = None
    """A kubeconfig; without one, `KUBECONFIG` counts, then the account of the pod that this runs in, then the
    user's own `~/.kube/config`."""

    kubernetes_context: str | None = None
    """The context of the kubeconfig; by default its current one."""

    kubernetes_namespace: Annotated[str, AfterValidator(_object_name)] = "orchestrator-submissions"
    """The namespace of submissions' pods; nothing else belongs there."""

    kubernetes_image: Annotated[str, Field(min_length=1)] | None = None
    """Submission base image of pods, pinned by its digest (`name@sha256:...`), for jobs that name none."""

    kubernetes_allowed_images: Annotated[tuple[str, ...], NoDecode] = ()
    """Repositories that a job's own image may come from, comma-separated; by default none."""

    kubernetes_allow_tags: bool = False
    """Whether `kubernetes_image` may be a tag, which somebody may move; for tests with a local image."""

    kubernetes_service_account: Annotated[str, AfterValidator(_object_name)] = "submission"
    """Service account of pods: one without any binding, whose token they do not get."""

    kubernetes_runtime_class: str | None = None
    """RuntimeClass of pods, such as that of gVisor or Kata Containers; by default that of the cluster."""

    kubernetes_user_namespaces: bool = False
    """Whether pods get a user namespace of their own (`hostUsers: false`), which not every node can do."""

    kubernetes_node_selector: Annotated[tuple[_NodeLabel, ...], NoDecode] = ()
    """Labels of the nodes that pods may run on, comma-separated: `key=value`."""

    kubernetes_tolerations: Annotated[tuple[_Taint, ...], NoDecode] = ()
    """Taints that pods tolerate, comma-separated, as kubectl writes them: `key=value:NoSchedule`,
    `key:NoSchedule`."""

    kubernetes_priority_class: str | None = None
    """PriorityClass of pods."""

    kubernetes_pull_secrets: Annotated[tuple[str, ...], NoDecode] = ()
    """Secrets with which nodes pull the images, comma-separated."""

    kubernetes_default_cpus: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 1.0
    """Cores of a pod whose job asks for none."""

    kubernetes_max_cpus: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 4.0
    """Most cores that a job may ask for."""

    kubernetes_default_memory_bytes: Annotated[int, Field(ge=16 * 2**20, le=2**50)] = 2 * 2**30
    """Memory of a pod whose job asks for none."""

    kubernetes_max_memory_bytes: Annotated[int, Field(ge=16 * 2**20, le=2**50)] = 16 * 2**30
    """Most memory that a job may ask for."""

    kubernetes_default_disk_bytes: Bytes = 4 * 2**30
    """Disk of a pod whose job asks for none: unpacked archive, environment, temporary files and log."""

    kubernetes_max_disk_bytes: Bytes = 32 * 2**30
    """Most disk that a job may ask for."""

    kubernetes_max_gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """Most GPUs that a job may ask for."""

    kubernetes_gpu_resource: Annotated[str, Field(min_length=1)] = "nvidia.com/gpu"
    """The resource that a node's GPUs are."""

    kubernetes_unschedulable_seconds: Seconds = 600.0
    """How long a pod waits for a node or a quota that has room for it, besides start-up time."""

    # ------------------------------------------------------------------------------ unsafe clusters

    kubernetes_accept_unsafe: Annotated[tuple[_UnsafeFinding, ...], NoDecode] = ()
    """Findings of `orchestrator preflight` with which submissions may run all the same, comma-separated: see
    docs/preflight.md for what each gives up."""

    # -------------------------------------------------------------------------------------- telemetry

    telemetry_steps: bool = True
    """Whether `episode_step_data` is queued for the validator."""

    telemetry_episodes: bool = True
    """Whether `episode_data` is queued for the validator."""

    step_log_interval: Count = 1
    """Every how many steps one is logged, unless the job says."""

    telemetry_messages_per_row: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Most messages in one queue row; 1 sends each message bare."""

    telemetry_row_bytes: Annotated[int, Field(ge=1024, le=2**28)] = 2**20
    """Largest queue row that gathers messages; a single message may be longer."""

    episode_buffer_bytes: Annotated[int, Field(ge=1024, le=2**32)] = 8 * 2**20
    """Steps of one episode that a worker holds in memory before it stages them in the database."""

    sink_queue_bytes: Annotated[int, Field(ge=2**16, le=2**36)] = 64 * 2**20
    """Finished episodes that the result sink holds before workers have to wait."""

    sink_batch_episodes: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Most episodes that the result sink commits in one transaction."""

    retention_seconds: Seconds = 7 * 86_400.0
    """Age at which telemetry and status updates that nobody consumed, and held rows of `add_job`, are
    dropped; results never are."""

    retention_rows: Count = 1_000_000
    """Rows that each of these queues keeps at most; the oldest are dropped."""

    @field_validator(
        "archive_allowed_schemes",
        "archive_allowed_hosts",
        "archive_private_hosts",
        "kubernetes_accept_unsafe",
        mode="before",
    )
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(part.strip().lower() for part in value if part.strip())
        return value

    @field_validator(
        "kubernetes_allowed_images",
        "kubernetes_node_selector",
        "kubernetes_tolerations",
        "kubernetes_pull_secrets",
        mode="before",
    )
    @classmethod
    def _split_at_commas_as_written(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(part.strip() for part in value if part.strip())
        return value

    @field_validator("data_dir", "kubernetes_config_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # Actors run in other working directories than the command that was given the path.
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _image_is_pinned(self) -> Self:
        image = self.kubernetes_image
        if image and not self.kubernetes_allow_tags and not re.search("@sha256:[0-9a-f]{64}$", image):
            raise ValueError("kubernetes_image has to be pinned by its digest, like name@sha256:...")
        return self

    @model_validator(mode="after")
    def _defaults_are_allowed(self) -> Self:
        for what in ("cpus", "memory_bytes", "disk_bytes"):
            if getattr(self, f"kubernetes_default_{what}") > getattr(self, f"kubernetes_max_{what}"):
                raise ValueError(f"kubernetes_default_{what} may not be above kubernetes_max_{what}")
        return self

    @model_validator(mode="after")
    def _buffer_fits_the_sink(self) -> Self:
        if self.episode_buffer_bytes > self.sink_queue_bytes:
            raise ValueError("episode_buffer_bytes may not be above sink_queue_bytes: no episode could pass")
        return self


def load_settings(**overrides: Any) -> Settings:
    """The settings of the environment and of the file that it names; `overrides` that are not None win.

    Raises:
        UsageError: as `settings_in_effect`.
    """
    flags = {name: Given(value, Source.FLAG, name) for name, value in overrides.items() if value is not None}
    return settings_in_effect(flags).settings


def settings_in_effect(flags: Mapping[str, Given], file: Path | None = None) -> SettingsInEffect[Settings]:
    """What is named for this command wins over what lies about: flags, then the file, then variables.

    `file` is the one named for this command; without it, that of `ORCHESTRATOR_SETTINGS_FILE` counts.

    Raises:
        UsageError: a value is not allowed, a name is no setting, or the file cannot be read. The text names
            the place, the value (unless secret) and what is allowed.
    """
    return in_effect(Settings, flags, file)
