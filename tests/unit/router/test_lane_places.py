"""Where a lane message stands, from the subject that JetStream wants its acknowledgement on."""

import pytest

from services.router.adapters.inbound_nats import _places


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.SOMA_IN_0.consumer.1.4711.12.1700000000000000000.99",
        "$JS.ACK.domain.account.SOMA_IN_0.consumer.1.4711.12.1700000000000000000.99",
        "$JS.ACK._.account.SOMA_IN_0.consumer.1.4711.12.1700000000000000000.99.token",
    ],
    ids=["plain", "with domain and account", "with a token at the end"],
)
def test_stream_sequence_consumer_sequence_and_pending(reply: str) -> None:
    assert _places(reply) == (4711, 12, 99)
