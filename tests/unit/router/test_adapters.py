"""Which adapter stream gets a session: the same everywhere, spread evenly, stable when others come and go."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.router.domain.adapters import AdapterStream, choose
from soma_common import ids

SESSIONS = [ids.session_id("demo", "echo", "line", str(n)) for n in range(2000)]


def stream(number: int, instance: str, window: int = 10, gateway: str = "gateway-0") -> AdapterStream:
    return AdapterStream(gateway, number, "demo", "line", instance, window, live=True)


def chosen(session: bytes, *streams: AdapterStream) -> AdapterStream:
    found = choose(session, streams)
    assert found is not None
    return found


def test_nobody_gets_what_nobody_takes() -> None:
    assert choose(SESSIONS[0], []) is None
    assert choose(SESSIONS[0], [stream(1, "a", window=0)]) is None


def test_a_stream_without_a_window_is_passed_over() -> None:
    assert {chosen(s, stream(1, "a", window=0), stream(2, "b")).instance for s in SESSIONS} == {"b"}


@given(st.permutations([1, 2, 3, 4]), st.sampled_from(SESSIONS))
def test_the_order_in_which_streams_came_does_not_matter(order: list[int], session: bytes) -> None:
    one = chosen(session, *(stream(n, f"i{n}") for n in (1, 2, 3, 4)))
    assert chosen(session, *(stream(n, f"i{n}") for n in order)).instance == one.instance


def test_a_reconnected_instance_has_the_same_sessions() -> None:
    """Its stream has another number, perhaps at another gateway."""
    before = [chosen(s, stream(1, "a"), stream(2, "b")).instance for s in SESSIONS]
    assert [chosen(s, stream(2, "b"), stream(9, "a", gateway="gateway-1")).instance for s in SESSIONS] == before


def test_sessions_are_spread_evenly() -> None:
    counts = Counter(chosen(s, *(stream(n, f"i{n}") for n in range(4))).instance for s in SESSIONS)
    assert len(counts) == 4
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_only_the_sessions_of_a_stream_that_left_move() -> None:
    three = [stream(n, f"i{n}") for n in range(3)]
    for session in SESSIONS:
        before = chosen(session, *three)
        if before is not three[1]:
            assert chosen(session, three[0], three[2]) is before


def test_room() -> None:
    one = stream(1, "a", window=2)
    assert one.has_room
    one.in_hand = dict.fromkeys(SESSIONS[:2])
    assert not one.has_room
