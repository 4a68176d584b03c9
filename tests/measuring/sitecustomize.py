"""Measures the coverage of every Python process whose PYTHONPATH names this directory; see `make coverage`.

Python imports `sitecustomize` before anything else. coverage.py's own variables would not do: containers and
the commands of some tests get an environment of their own, which keeps PYTHONPATH but not those. And many of
our processes are killed, which is how Ray ends actors: so what was measured is saved every now and then.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / ".measured"
LIVE = MEASURED / "live"
FIRST_SAVE_SECONDS = 0.1
SAVE_EVERY_SECONDS = 1.0


class Measurement:
    """The coverage of this process, in files of its own."""

    def __init__(self, coverage: Any) -> None:
        LIVE.mkdir(parents=True, exist_ok=True)
        self._coverage = coverage.Coverage(
            data_file=str(LIVE / ".coverage"), data_suffix=True, config_file=str(ROOT / "pyproject.toml")
        )
        self._lock = threading.Lock()

    def start(self) -> None:
        self._coverage.start()
        atexit.register(self.save)
        os._exit = self._saving_before(os._exit)  # type: ignore[assignment]
        os.execv = self._saving_before(os.execv)  # type: ignore[assignment]
        # The lock may be held by a thread that the child of a fork does not have.
        os.register_at_fork(after_in_child=self._renew_lock)
        threading.Thread(target=self._save_now_and_then, name="coverage", daemon=True).start()

    def save(self) -> None:
        """Put a whole copy where it will be found: a process may be killed while it writes its own file."""
        with self._lock:
            self._coverage.save()
            live = Path(self._coverage.get_data().data_filename())
            if live.exists():
                partial = live.with_name(f"partial{live.name}")
                shutil.copyfile(live, partial)
                partial.replace(MEASURED / live.name)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def _save_now_and_then(self) -> None:
        pause_seconds = FIRST_SAVE_SECONDS
        ray: Any = None
        while True:
            time.sleep(pause_seconds)
            if ray is None and hasattr(sys.modules.get("ray"), "kill"):
                ray = sys.modules["ray"]
                # Our actors end themselves with it, right after the lines that matter most.
                ray.kill = self._saving_before(ray.kill)
            self.save()
            # Often at first: many a process of the tests is killed soon after it has answered.
            pause_seconds = min(1.3 * pause_seconds, SAVE_EVERY_SECONDS)

    def _saving_before(self, end: Callable[..., Any]) -> Callable[..., Any]:
        def save_and_end(*arguments: Any, **options: Any) -> Any:
            self.save()
            return end(*arguments, **options)

        return save_and_end


def let_others_save() -> None:
    """Return once every measured process that lives now has saved what it did until now."""
    time.sleep(2 * SAVE_EVERY_SECONDS)


def measure() -> None:
    """Begin, unless this is the interpreter of an environment without coverage.py."""
    try:
        import coverage
    except ImportError:
        return
    Measurement(coverage).start()


measure()
