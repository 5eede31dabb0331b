"""Shares of partitions: even, complete, and nothing moves that need not."""

from hypothesis import given
from hypothesis import strategies as st

from services.router.domain.spread import shares, turn_of

ROUTERS = st.dictionaries(st.sampled_from([f"router-{n}" for n in range(8)]), st.integers(0, 20), min_size=1)


@given(ROUTERS, st.integers(0, 64))
def test_all_partitions_are_shared_and_no_share_is_two_more_than_another(held: dict[str, int], spare: int) -> None:
    partitions = sum(held.values()) + spare
    share = shares(held, partitions)
    assert share.keys() == held.keys()
    assert sum(share.values()) == partitions
    assert max(share.values()) - min(share.values()) <= 1


@given(ROUTERS, st.integers(0, 64))
def test_who_has_its_share_keeps_it_when_all_have_theirs(held: dict[str, int], spare: int) -> None:
    share = shares(held, sum(held.values()) + spare)
    assert shares(share, sum(share.values())) == share


def test_what_is_left_over_goes_to_those_that_hold_most() -> None:
    assert shares({"a": 2, "b": 3, "c": 3}, 8) == {"a": 2, "b": 3, "c": 3}
    assert shares({"a": 3, "b": 3, "c": 3, "d": 0}, 9) == {"a": 3, "b": 2, "c": 2, "d": 2}
    assert shares({"a": 0, "b": 0}, 3) == {"a": 2, "b": 1}


def test_routers_look_for_free_partitions_in_different_places() -> None:
    held = {f"router-{n}": 0 for n in range(4)}
    assert sorted(turn_of(router, held, 8) for router in held) == [0, 2, 4, 6]
