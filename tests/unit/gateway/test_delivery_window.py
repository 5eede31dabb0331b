from soma.common.v1.turn_pb2 import Delivery

from services.gateway.domain.delivery_window import MAX_WINDOW, REMEMBERED_ACKS, SLACK, DeliveryWindow, Offer


def delivery(number: int, size: int = 10) -> Delivery:
    return Delivery(delivery_id=number.to_bytes(16, "big"), session="x" * size)


def taken(window: DeliveryWindow, max_bytes: int = 1_000_000) -> list[int]:
    return [int.from_bytes(d.delivery_id, "big") for d in window.take(max_bytes)]


def test_credit_decides_what_goes_and_acks_do_not_renew_it() -> None:
    window = DeliveryWindow(2)
    for number in range(4):
        assert window.offer("r", delivery(number)) is Offer.QUEUED
    assert taken(window) == [0, 1]
    assert window.ack(delivery(0).delivery_id) == "r"
    assert taken(window) == []
    window.grant(1)
    assert taken(window) == [2]
    assert window.size == 2


def test_an_unknown_ack_is_nobodys() -> None:
    assert DeliveryWindow(2).ack(b"x" * 16) is None


def test_offers_repeat_without_effect_but_the_latest_router_counts() -> None:
    window = DeliveryWindow(1)
    window.offer("old", delivery(1))
    assert window.offer("new", delivery(1)) is Offer.HELD
    assert taken(window) == [1]
    assert window.offer("newest", delivery(1)) is Offer.HELD
    assert window.ack(delivery(1).delivery_id) == "newest"
    assert window.offer("r", delivery(1)) is Offer.PROCESSED


def test_a_nacked_delivery_may_come_again() -> None:
    window = DeliveryWindow(2)
    window.offer("r", delivery(1))
    taken(window)
    assert window.nack(delivery(1).delivery_id) == "r"
    assert window.offer("r", delivery(1)) is Offer.QUEUED


def test_the_queue_is_bounded_by_number_and_bytes() -> None:
    window = DeliveryWindow(4)
    offers = [window.offer("r", delivery(number)) for number in range(100)]
    assert offers.count(Offer.QUEUED) == 4 + SLACK
    heavy = DeliveryWindow(1000)
    offers = [heavy.offer("r", delivery(number, 1_000_000)) for number in range(20)]
    assert offers.count(Offer.QUEUED) == 8


def test_a_frame_takes_about_its_bytes_and_at_least_one() -> None:
    window = DeliveryWindow(10)
    for number in range(3):
        window.offer("r", delivery(number, 1000))
    assert taken(window, 1500) == [0, 1]
    assert taken(window, 1) == [2]


def test_the_window_is_capped_whatever_credit_is_granted() -> None:
    assert DeliveryWindow(65536).size == MAX_WINDOW


def test_leaving_returns_what_is_open_and_says_what_was_sent() -> None:
    window = DeliveryWindow(1)
    window.offer("r", delivery(1))
    window.offer("q", delivery(2))
    taken(window)
    left = [(int.from_bytes(u.delivery_id, "big"), u.router, u.sent) for u in window.leave()]
    assert left == [(1, "r", True), (2, "q", False)]
    assert window.unfinished == 0


def test_remembered_acks_are_bounded() -> None:
    window = DeliveryWindow(1, (delivery(n).delivery_id for n in range(REMEMBERED_ACKS + 5)))
    assert window.offer("r", delivery(0)) is Offer.QUEUED
    assert window.offer("r", delivery(REMEMBERED_ACKS)) is Offer.PROCESSED
