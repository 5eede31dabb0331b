from soma.common.v1.turn_pb2 import Delivery

from soma_common.client.inbox import Arrival, Inbox


def delivery(position: int, session: str = "s") -> Delivery:
    return Delivery(delivery_id=f"{session}{position}".encode(), agent="a", session=session, position=position)


def test_what_is_in_hand_or_processed_is_not_new() -> None:
    inbox = Inbox()
    assert inbox.arrive(delivery(1), 1) is Arrival.NEW
    assert inbox.arrive(delivery(1), 1) is Arrival.IN_HAND
    assert inbox.ack(delivery(1), 1)
    assert inbox.arrive(delivery(1), 1) is Arrival.PROCESSED
    assert inbox.arrive(delivery(1, "other"), 1) is Arrival.NEW
    assert inbox.processed() == [b"s1"]


def test_a_nacked_delivery_is_new_again() -> None:
    inbox = Inbox()
    inbox.arrive(delivery(1), 1)
    assert inbox.nack(delivery(1), 1)
    assert inbox.arrive(delivery(1), 1) is Arrival.NEW


def test_credit_is_renewed_only_on_the_stream_that_gave_it() -> None:
    inbox = Inbox()
    inbox.arrive(delivery(1), 1)
    inbox.arrive(delivery(2, "t"), 1)
    assert inbox.arrive(delivery(2, "t"), 2) is Arrival.IN_HAND
    assert not inbox.ack(delivery(1), 2)
    assert inbox.ack(delivery(2, "t"), 2)
