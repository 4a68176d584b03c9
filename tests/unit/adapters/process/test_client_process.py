import json
import subprocess
import sys

import pytest

from orchestrator.adapters.process.client_process import is_known_dead, this_process


def test_a_process_is_known_dead_once_it_has_ended() -> None:
    code = (
        "from orchestrator.adapters.process.client_process import this_process\n"
        "print(this_process(), flush=True); input()"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    name = client.stdout.readline()
    alive = is_known_dead(name)

    client.kill()
    client.communicate()

    assert not alive
    assert is_known_dead(name)
    assert not is_known_dead(this_process())


def test_a_number_that_another_process_has_now_is_not_taken_for_the_client() -> None:
    name = json.loads(this_process())

    assert is_known_dead(json.dumps(name | {"started": name["started"] - 1}))


@pytest.mark.parametrize("change", [{"machine": "another"}, {"pid": None}, {"pid": "x"}])
def test_of_what_cannot_be_known_from_here_nothing_is_said(change: dict[str, object]) -> None:
    name = json.loads(this_process()) | {"started": 0}

    assert not is_known_dead(json.dumps(name | change))
    assert not is_known_dead("")
