import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.episodes import derive_seed, open_secret, plan_episodes

SECRET = b"installation"


@given(st.binary(min_size=1), st.text(), st.text(), st.integers(0, 2**31))
def test_every_seed_fits_31_bits(secret: bytes, group: str, task: str, episode: int) -> None:
    assert 0 <= derive_seed(secret, group, "environment", task, episode) < 2**31


def test_a_seed_is_the_documented_digest() -> None:
    text = b"group\x1fenvironment\x1freach-v3\x1f4"
    digest = hmac.new(SECRET, text, hashlib.sha256).digest()

    seed = derive_seed(SECRET, "group", "environment", "reach-v3", 4)

    assert seed == int.from_bytes(digest[:4], "big") % 2**31


def test_the_plan_goes_task_by_task() -> None:
    plan = plan_episodes(["b", "a"], 2, secret=SECRET, seed_group="g")

    assert [(episode.task_id, episode.episode_id) for episode in plan] == [
        ("b", 0),
        ("b", 1),
        ("a", 0),
        ("a", 1),
    ]


def test_submissions_of_one_seed_group_get_the_same_plan_and_other_groups_another() -> None:
    def plan(group: str) -> list[int]:
        return [episode.seed for episode in plan_episodes(["t"], 50, secret=SECRET, seed_group=group)]

    assert plan("spring") == plan("spring")
    assert not set(plan("spring")) & set(plan("autumn"))


def test_what_the_submission_is_told_gives_no_environment_seed_away() -> None:
    plan = plan_episodes(["t", "u"], 100, secret=SECRET, seed_group="g")

    seeds = {episode.seed for episode in plan}
    policy_seeds = {episode.policy_seed for episode in plan}

    assert len(seeds) == len(policy_seeds) == 200
    assert not seeds & policy_seeds


def test_more_episodes_leave_the_first_ones_as_they_were() -> None:
    few = plan_episodes(["t"], 3, secret=SECRET, seed_group="g")
    many = plan_episodes(["t"], 9, secret=SECRET, seed_group="g")

    assert many[:3] == few


def test_open_seeds_are_public_and_differ_by_number() -> None:
    assert open_secret(7) == open_secret(7) != open_secret(8)
