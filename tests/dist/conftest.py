import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def pools():
    """pools(world) → Ranks, started once and again after a failure."""
    started: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in started or not all(p.is_alive() for p in started[world].processes):
            started[world] = Ranks(world)
        return started[world]

    yield get
    for ranks in started.values():
        ranks.close()
