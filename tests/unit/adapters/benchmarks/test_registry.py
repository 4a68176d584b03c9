"""How providers are found, and what is said when they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.adapters.benchmarks.registry import load_benchmark, load_provider, provider_names
from orchestrator.domain.errors import UsageError

PACKAGE = """\
class Provider:
    name = "maze"

    def benchmark_names(self):
        return ("Maze-v0",)

    def load(self, benchmark_name, config, spec):
        return (benchmark_name, config, spec)

ready_made = Provider()
nothing = object()
"""


def install(site: Path, package: str, entry_points: str, code: str = PACKAGE) -> None:
    """A package as pip would leave it."""
    (site / f"{package}.py").write_text(code)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[orchestrator.benchmarks]\n{entry_points}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_unknown_provider_is_answered_with_all_and_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load_benchmark("Gymnasum", "CartPole-v1", {}, None)

    assert "Did you mean 'gymnasium'?" in str(caught.value)
    assert "gymnasium, metaworld" in str(caught.value)


@pytest.mark.parametrize("target", ["Provider", "ready_made"])
def test_another_package_adds_a_provider_by_its_entry_point(site: Path, target: str) -> None:
    package = f"maze_{target.lower()}"
    install(site, package, f"maze = {package}:{target}")

    assert "maze" in provider_names()
    assert load_benchmark("maze", "Maze-v0", {"size": 3}, None) == ("Maze-v0", {"size": 3}, None)


def test_a_broken_provider_is_an_error_only_when_it_is_asked_for(site: Path) -> None:
    install(site, "maze_broken", "broken = maze_broken:Provider", "raise RuntimeError('no licence')")

    assert "broken" in provider_names()
    assert load_provider("gymnasium").name == "gymnasium"
    with pytest.raises(UsageError, match=r"maze_broken:Provider of maze_broken.*RuntimeError: no licence"):
        load_provider("broken")


def test_an_entry_point_that_is_no_provider_is_refused(site: Path) -> None:
    install(site, "maze_nothing", "nothing = maze_nothing:nothing")

    with pytest.raises(UsageError, match="has no benchmark_names and no load"):
        load_provider("nothing")


def test_a_name_that_two_packages_claim_is_refused(site: Path) -> None:
    install(site, "maze_one", "maze = maze_one:Provider")
    install(site, "maze_two", "maze = maze_two:Provider")

    with pytest.raises(UsageError, match=r"several packages: maze_one:Provider of maze_one, maze_two"):
        load_provider("maze")


def test_a_built_in_provider_cannot_be_replaced(site: Path) -> None:
    install(site, "maze_impostor", "gymnasium = maze_impostor:Provider")

    assert "CartPole-v1" in load_provider("gymnasium").benchmark_names()


def test_a_benchmark_of_gymnasium_imports_no_other_simulator() -> None:
    script = (
        "import sys\n"
        "from orchestrator.adapters.benchmarks.registry import load_benchmark\n"
        "load_benchmark('gymnasium', 'CartPole-v1', {}, None)\n"
        "sys.exit(bool({'mujoco', 'metaworld', 'ray'} & sys.modules.keys()))\n"
    )

    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 0
