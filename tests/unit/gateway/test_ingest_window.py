"""How much lies in a lane ahead of what the routers have taken in."""

from services.gateway.domain.ingest_window import SILENT_S, IngestWindow, LaneProgress


def test_the_slowest_router_that_speaks_says_how_far_a_lane_is_taken_in() -> None:
    now = 0.0
    progress = LaneProgress(lambda: now)
    assert progress.floor(0) is None
    progress.heard(0, "router-0", 10)
    progress.heard(0, "router-1", 7)
    progress.heard(1, "router-0", 3)
    assert progress.floor(0) == 7
    assert progress.floor(1) == 3
    now = SILENT_S
    progress.heard(0, "router-0", 12)
    assert progress.floor(0) == 7
    now = SILENT_S * 1.5
    assert progress.floor(0) == 12, "the silent one does not count"
    now = SILENT_S * 3
    assert progress.floor(0) is None


def test_items_beyond_the_floor_are_ahead() -> None:
    window = IngestWindow()
    window.stored(4, 10)
    window.stored(6, 5)
    assert window.ahead(3) == 15
    assert window.ahead(4) == 5
    assert window.ahead(5) == 5
    assert window.ahead(6) == 0


def test_while_nobody_speaks_nothing_is_kept() -> None:
    window = IngestWindow()
    window.stored(4, 10)
    assert window.ahead(None) == 0
    assert window.ahead(0) == 0


def test_a_lane_that_was_made_anew_counts_from_its_beginning() -> None:
    window = IngestWindow()
    window.stored(400, 10)
    window.stored(1, 3)
    assert window.ahead(0) == 3
