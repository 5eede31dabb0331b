import asyncio

import pytest
from soma.common.v1.message_pb2 import Error
from soma.gateway.v1.channel_service_pb2 import Cancel, InboundMessage
from structlog.testing import capture_logs

from soma_common.client.outbox import Outbox


def filled(count: int, answers: list[tuple[bytes, Error | None]] | None = None) -> Outbox:
    outbox = Outbox(100)
    for number in range(count):
        outbox.add(
            InboundMessage(idempotency_key=str(number)),
            5,
            lambda message_id, error: (answers if answers is not None else []).append((message_id, error)),
        )
    return outbox


def refs(taken: list[InboundMessage | Cancel]) -> list[int]:
    return [item.ref for item in taken]


def test_items_go_out_once_in_order_within_the_bounds() -> None:
    outbox = filled(10)
    assert refs(outbox.take(8, 5, 10_000)) == [1, 2, 3, 4, 5]
    assert refs(outbox.take(8, 5, 10_000)) == [6, 7, 8]
    assert refs(outbox.take(8, 5, 10_000)) == []
    outbox.answer(2, b"id", None)
    assert refs(outbox.take(8, 5, 10_000)) == [9]
    assert (outbox.in_flight, outbox.unsent, len(outbox)) == (8, 1, 9)


def test_a_lost_stream_rewinds_to_everything_unanswered() -> None:
    answers: list[tuple[bytes, Error | None]] = []
    outbox = filled(5, answers)
    outbox.take(10, 3, 10_000)
    outbox.answer(2, b"two", None)
    outbox.rewind()
    assert refs(outbox.take(10, 10, 10_000)) == [1, 3, 4, 5]
    outbox.answer(2, b"again", None)
    assert answers == [(b"two", None)]


def test_one_item_goes_even_if_it_is_larger_than_a_frame() -> None:
    outbox = filled(2)
    assert refs(outbox.take(10, 10, 1)) == [1]
    assert refs(outbox.take(10, 10, 1)) == [2]


def test_a_message_behind_a_cancel_waits_for_the_next_frame() -> None:
    outbox = filled(1)
    outbox.add(Cancel(), 2, lambda *_: None)
    outbox.add(Cancel(), 2, lambda *_: None)
    outbox.add(InboundMessage(), 2, lambda *_: None)
    assert refs(outbox.take(10, 10, 10_000)) == [1, 2, 3]
    assert refs(outbox.take(10, 10, 10_000)) == [4]


def test_failing_answers_everything_once() -> None:
    answers: list[tuple[bytes, Error | None]] = []
    outbox = filled(3, answers)
    error = Error(message="over")
    outbox.fail(error)
    outbox.fail(error)
    assert answers == [(b"", error)] * 3
    assert len(outbox) == 0


@pytest.mark.parametrize("raised", [ValueError, TimeoutError, asyncio.CancelledError])
def test_a_callback_that_raises_is_logged_and_the_others_are_told(raised: type[BaseException]) -> None:
    told: list[tuple[bytes, Error | None]] = []

    def fail(message_id: bytes, error: Error | None) -> None:
        told.append((message_id, error))
        raise raised("no")

    outbox = Outbox(10)
    for _ in range(4):
        outbox.add(InboundMessage(), 2, fail)
    error = Error(message="over")
    with capture_logs() as logs:
        outbox.answer(1, b"one", None)
        outbox.answer(2, b"", error)
        outbox.fail(error)
    assert told == [(b"one", None), (b"", error), (b"", error), (b"", error)]
    assert [(line["event"], line["ref"], line["exc_info"]) for line in logs] == [
        ("channel_client.answer_failed", ref, True) for ref in (1, 2, 3, 4)
    ]
    assert len(outbox) == 0
