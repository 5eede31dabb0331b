"""The memory for deliveries: within its bounds, and never full for those that hold little."""

from hypothesis import given
from hypothesis import strategies as st

from services.router.domain.delivery_room import ChannelShare, DeliveryRoom

ITEMS, BYTES = 2048, 1 << 20
SHARE = BYTES // 64


def filled(room: DeliveryRoom, share: ChannelShare, size: int = 1) -> int:
    """Takes as many deliveries of that size as the channel may have."""
    count = 0
    while room.fits(share, size):
        room.take(share, 1, size)
        count += 1
    return count


@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(1, BYTES // 4), st.booleans()),
        min_size=1, max_size=300,
    )
)  # fmt: skip
def test_all_together_keep_within_the_bounds(wanted: list[tuple[int, int, int, bool]]) -> None:
    """Whoever asks in whatever order; a tenant has no more than half of it."""
    room = DeliveryRoom(64, BYTES, 20)
    shares = {(t, c): room.share(f"t{t}") for t in range(8) for c in range(4)}
    held: list[tuple[ChannelShare, int]] = []
    for tenant, channel, size, leaves in wanted:
        share = shares[tenant, channel]
        if leaves and held:
            room.give_back(held[-1][0], 1, held.pop()[1])
        if room.fits(share, size):
            room.take(share, 1, size)
            held.append((share, size))
        assert room.items == len(held) <= 64
        assert room.size == sum(size for _, size in held) <= BYTES
        assert share.tenant.items <= 32
        assert share.tenant.size <= BYTES // 2


def test_a_channel_has_a_bound_of_its_own_and_one_of_its_tenant() -> None:
    room = DeliveryRoom(ITEMS, BYTES, 400)
    assert [filled(room, room.share("t")) for _ in range(3)] == [400, 112, 2]
    assert filled(room, room.share("t"), BYTES // 8) == 1, "bytes were left"


def test_tenants_that_take_what_they_can_leave_a_share_to_others() -> None:
    room = DeliveryRoom(ITEMS, BYTES, 400)
    for name in ("a", "b"):
        assert filled(room, room.share(name), BYTES // ITEMS * 16) == ITEMS // 4 // 16
    assert 2 * room.size == BYTES
    for n in range(32):
        assert filled(room, room.share(f"t{n}"), SHARE // 4) == 4
    assert room.size == BYTES
    assert not room.fits(room.share("late"), 1)


def test_a_tenants_other_channels_get_some_while_its_stuck_ones_have_what_they_may() -> None:
    room = DeliveryRoom(ITEMS, BYTES, 400)
    filled(room, room.share("a"), SHARE)
    filled(room, room.share("b"), SHARE)
    assert all(filled(room, room.share("a"), 512) == 2 for _ in range(256))
    assert not room.fits(room.share("a"), 512)
    assert room.fits(room.share("c"), 512)


def test_who_holds_nothing_gets_one_however_large() -> None:
    room = DeliveryRoom(ITEMS, BYTES, 400)
    one = room.share("a")
    assert filled(room, one, 2 * BYTES) == 1, "beyond the bound only if there is nothing else"
    assert not room.fits(room.share("b"), 1)
    room.give_back(one, 1, 2 * BYTES)
    filled(room, one, SHARE)
    assert filled(room, room.share("a"), BYTES // 4) == 1, "a channel within half of the memory"
    assert filled(room, room.share("b"), BYTES // 2) == 1, "a tenant within all of it"


def test_a_page_is_worth_reading() -> None:
    room = DeliveryRoom(ITEMS, BYTES, 400)
    share = room.share("a")
    assert room.page(share, 10, 256) == 256
    assert room.page(share, BYTES // 40, 256) == 10, "what fits"
    assert room.page(share, BYTES, 256) == 1
    filled(room, share)
    assert room.page(share, 1, 256) == 0
    room.give_back(share, 50, 50)
    assert room.page(share, 1, 256) == 0, "a read for a few would be one for each acknowledgement"
    room.give_back(share, 50, 50)
    assert room.page(share, 1, 256) == 100


def test_shares_that_end_leave_nothing() -> None:
    room = DeliveryRoom(ITEMS, BYTES, 400)
    one, two = room.share("a"), room.share("a")
    assert one.tenant is two.tenant
    room.end(one)
    room.take(two, 1, 1)
    assert room.share("a").tenant is two.tenant
    room.give_back(two, 1, 1)
    assert (room.items, room.size, two.tenant.items) == (0, 0, 0)
