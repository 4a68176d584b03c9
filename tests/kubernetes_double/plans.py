"""What a test can order: how a pod fares from its creation on, and how long each thing takes."""

from __future__ import annotations

from dataclasses import dataclass, field

EMPTY: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long things take; the defaults are those of a real node, scaled down."""

    schedule_seconds: float = 0.01
    create_seconds: float = 0.05
    running_lag_seconds: float = 0.02
    terminated_lag_seconds: float = 0.02
    phase_lag_seconds: float = 0.15  # the phase comes that long after `state.terminated`
    removal_lag_seconds: float = 0.02
    garbage_seconds: float = 0.03
    egress_open_seconds: float = 0.15
    not_ready_seconds: float = 0.3
    node_lifecycle_scale: float = 0.01  # of tolerationSeconds
    bookmark_seconds: float = 0.5
    housekeeping_seconds: float = 0.1
    grace_scale: float = 1.0  # of a grace period


def real_timing() -> Timing:
    """What was measured on a real node."""
    return Timing(
        schedule_seconds=0.05,
        create_seconds=0.8,
        running_lag_seconds=0.1,
        terminated_lag_seconds=0.3,
        phase_lag_seconds=2.0,
        removal_lag_seconds=0.3,
        garbage_seconds=0.15,
        egress_open_seconds=0.8,
        not_ready_seconds=49.0,
        node_lifecycle_scale=1.0,
        bookmark_seconds=30.0,
        housekeeping_seconds=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one pod fares. Times None are for ever (until it is deleted)."""

    # The scheduler finds no node.
    unschedulable: str | None = None
    unschedulable_seconds: float | None = None
    # The kubelet does not let it in: `OutOfmemory`, `OutOfcpu`.
    refused_by_kubelet: str | None = None
    # The container waits for this reason with these words, one after the other: `ErrImagePull`, then
    # `ImagePullBackOff`; `CreateContainerConfigError`, `InvalidImageName`.
    waits: tuple[tuple[str, str], ...] = EMPTY
    waits_seconds: float | None = None
    # It stays in ContainerCreating, and only an event says why: FailedMount, FailedCreatePodSandBox.
    event: tuple[str, str] | None = None
    event_seconds: float | None = None
    start_error: str | None = None  # `StartError`, 128
    # The end without a process: exit code and log.
    exits: int | None = None
    prints: str = ""
    # The cluster does not enforce its NetworkPolicy: the egress stays open.
    egress_stays_open: bool = False
    # It is enforced against other pods and the world, too, for what runs on Python in this pod.
    polices_python: bool = False
    timing: Timing | None = field(default=None)


IMAGE_CANNOT_BE_PULLED = Plan(
    waits=(
        (
            "ErrImagePull",
            'failed to pull and unpack image "example.org/none:1": failed to resolve reference: not found',
        ),
        ("ImagePullBackOff", 'Back-off pulling image "example.org/none:1"'),
    )
)
IMAGE_NAME_IS_INVALID = Plan(
    waits=(
        ("InvalidImageName", 'Failed to apply default image tag "UPPER": couldn\'t parse image name "UPPER"'),
    )
)
CONFIG_IS_WRONG = Plan(waits=(("CreateContainerConfigError", 'configmap "settings" not found'),))
NO_NODE = Plan(unschedulable="0/3 nodes are available: 3 Insufficient memory.")
OUT_OF_MEMORY_ON_NODE = Plan(refused_by_kubelet="OutOfmemory")
MOUNT_FAILS = Plan(event=("FailedMount", 'MountVolume.SetUp failed for volume "work": permission denied'))
SANDBOX_FAILS = Plan(
    event=(
        "FailedCreatePodSandBox",
        "Failed to create pod sandbox: rpc error: code = Unknown desc = user namespaces are not supported",
    )
)
CANNOT_START = Plan(start_error='exec: "pythn": executable file not found in $PATH')
