from soma_common.newest_dispatch import REMEMBERED_TURNS, NewestDispatch


def test_an_older_dispatch_is_over_once_a_newer_was_shown() -> None:
    shown = NewestDispatch()
    assert [shown.admits(b"a", dispatch) for dispatch in (1, 1, 2, 1, 2, 4, 3, 4)] == [
        True, True, True, False, True, True, False, True,
    ]  # fmt: skip


def test_turns_do_not_concern_each_other() -> None:
    shown = NewestDispatch()
    assert shown.admits(b"a", 5)
    assert shown.admits(b"b", 1)


def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten_first() -> None:
    shown = NewestDispatch()
    for number in range(REMEMBERED_TURNS):
        shown.admits(number.to_bytes(4, "big"), 2)
    shown.admits(b"one more", 1)
    assert not shown.admits((1).to_bytes(4, "big"), 1)
    assert shown.admits((0).to_bytes(4, "big"), 1)
    assert len(shown._newest) == REMEMBERED_TURNS
