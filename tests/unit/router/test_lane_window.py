"""What of a lane may be purged, when."""

from services.router.domain.lane_window import CommittedPlace, LaneExtent, LaneWindow

LAG = 600.0
LANE = LaneExtent(1, 10_000, 1_000_000)
ALONE = CommittedPlace(0, None)


def a_window(lag_s: float = LAG, max_messages: int = 50_000, max_bytes: int = 1 << 30) -> LaneWindow:
    return LaneWindow(lag_s, max_messages, max_bytes)


def test_nothing_is_purged_before_it_was_committed_for_the_lag() -> None:
    window = a_window()
    assert window.purge_below(0, "a", 100, ALONE, LANE) == 0
    assert window.purge_below(300, "a", 200, ALONE, LANE) == 0
    assert window.purge_below(599, "a", 300, ALONE, LANE) == 0
    assert window.purge_below(600, "a", 400, ALONE, LANE) == 100
    assert window.purge_below(900, "a", 400, ALONE, LANE) == 200
    assert window.purge_below(9000, "a", 400, ALONE, LANE) == 400


def test_without_a_lag_everything_committed_is_purged() -> None:
    window = a_window(lag_s=0)
    assert [window.purge_below(at, "a", 10 * at, ALONE, LANE) for at in range(1, 5)] == [10, 20, 30, 40]


def test_a_standby_that_has_it_not_on_disk_holds_it_however_old() -> None:
    window = a_window()
    window.purge_below(0, "a", 100, CommittedPlace(1000, 500), LANE)
    assert window.purge_below(700, "a", 200, CommittedPlace(2000, 999), LANE) == 0
    assert window.purge_below(701, "a", 200, CommittedPlace(2000, 1000), LANE) == 100
    assert window.purge_below(1400, "a", 200, CommittedPlace(2000, 1999), LANE) == 100
    assert window.purge_below(1401, "a", 200, CommittedPlace(2000, None), LANE) == 200, "the standby has gone"


def test_a_standby_that_may_not_be_seen_holds_everything() -> None:
    window = a_window(lag_s=0, max_messages=0)
    assert [window.purge_below(at, "a", 100, CommittedPlace(at, 0), LANE) for at in range(1, 100)] == [0] * 99


def test_a_lane_that_holds_too_many_messages_is_purged_before_its_time() -> None:
    window = a_window(max_messages=30)
    assert window.purge_below(0, "a", 100, ALONE, LANE) == 70
    assert window.purge_below(1, "a", 120, ALONE, LANE) == 90


def test_a_lane_that_holds_too_many_bytes_is_purged_before_its_time() -> None:
    window = a_window(max_bytes=5_000)  # 100 bytes each: room for 50
    assert window.purge_below(0, "a", 80, ALONE, LANE) == 30


def test_a_crowded_lane_does_not_overtake_a_standby() -> None:
    window = a_window(max_messages=0)
    assert window.purge_below(0, "a", 100, CommittedPlace(10, 5), LANE) == 0
    assert window.purge_below(20, "a", 200, CommittedPlace(20, 10), LANE) == 100


def test_a_database_that_went_back_begins_its_lag_anew() -> None:
    window = a_window()
    window.purge_below(0, "a", 500, ALONE, LANE)
    assert window.purge_below(650, "a", 90, ALONE, LANE) == 0
    assert window.purge_below(1249, "a", 500, ALONE, LANE) == 0
    assert window.purge_below(1250, "a", 500, ALONE, LANE) == 90


def test_another_stream_begins_its_lag_anew() -> None:
    window = a_window()
    window.purge_below(0, "a", 500, ALONE, LANE)
    assert window.purge_below(650, "b", 700, ALONE, LANE) == 0


def test_what_is_remembered_is_bounded() -> None:
    window = a_window(lag_s=0.0)
    for at in range(1, 5000):
        window.purge_below(at, "a", at, CommittedPlace(at, 0), LANE)
    assert len(window._samples) <= 256


def test_the_window_says_how_old_a_copy_may_be() -> None:
    window = a_window()
    assert window.reaches_back_s(0, LANE) == 0
    window.purge_below(0, "a", 100, ALONE, LANE)
    window.purge_below(300, "a", 200, ALONE, LANE)
    assert window.reaches_back_s(300, LANE) == 300
    assert window.reaches_back_s(400, LaneExtent(150, 10_000, 1_000_000)) == 100
