"""What an adapter saw, and whether it may have seen it: one outcome for each accepted message, in order."""

from collections import defaultdict
from dataclasses import dataclass, field

from soma.common.v1.message_pb2 import Message
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome

from soma_common.testing.eventually import eventually

OUTCOME_TIMEOUT_S = 30.0


@dataclass
class Record:
    """The deliveries and live events of some adapters, in the order they came; has the callbacks for ChannelClient."""

    deliveries: list[Delivery] = field(default_factory=list)
    live: list[LiveEvent] = field(default_factory=list)

    def on_delivery(self, delivery: Delivery) -> None:
        """Keep a delivery; returning acknowledges it."""
        self.deliveries.append(delivery)

    def on_live(self, event: LiveEvent) -> None:
        """Keep a live event."""
        self.live.append(event)

    def of_session(self, session: str) -> list[Delivery]:
        """Return the deliveries of a session in the order they came."""
        return [delivery for delivery in self.deliveries if delivery.session == session]

    async def outcome_of(self, message_id: bytes, timeout_s: float = OUTCOME_TIMEOUT_S) -> Delivery:
        """Wait for the delivery that answers a message."""

        def found() -> Delivery | None:
            return next((delivery for delivery in self.deliveries if message_id in delivery.message_ids), None)

        delivery = await eventually(found, timeout_s, f"an outcome of message {message_id.hex()}")
        assert delivery is not None
        return delivery

    async def all_answered(self, accepted: list[bytes], timeout_s: float = OUTCOME_TIMEOUT_S) -> None:
        """Wait until every accepted message has an outcome; then check that all of it is right."""
        await eventually(
            lambda: set(accepted) <= self._answered(), timeout_s, f"outcomes of {len(accepted)} accepted messages"
        )
        self.check(accepted)

    def check(self, accepted: list[bytes]) -> None:
        """Assert: exactly one outcome for each accepted message, no position twice, positions dense and rising."""
        answers = [message_id for delivery in self.deliveries for message_id in delivery.message_ids]
        assert sorted(answers) == sorted(set(accepted)), "every accepted message has exactly one outcome"
        positions: dict[tuple[str, str], list[int]] = defaultdict(list)
        for delivery in self.deliveries:
            positions[delivery.agent, delivery.session].append(delivery.position)
        for session, seen in positions.items():
            assert seen == list(range(1, len(seen) + 1)), f"deliveries of {session} came as {seen}"

    def _answered(self) -> set[bytes]:
        return {message_id for delivery in self.deliveries for message_id in delivery.message_ids}


def text_of(message: Message) -> str:
    """Return the text parts of a message as one."""
    return "".join(part.text for part in message.parts)


def answer(delivery: Delivery) -> str:
    """Return the text of a final; fails for any other outcome."""
    assert delivery.outcome == Outcome.OUTCOME_FINAL, delivery
    return text_of(delivery.message)


def shown_text(events: list[LiveEvent]) -> str:
    """Return what a client shows in the end: texts put at their offsets, what was restarted taken back."""
    steps: dict[int, str] = {}
    dispatch = 0
    for event in events:
        if event.dispatch > dispatch:
            dispatch = event.dispatch
        elif event.dispatch < dispatch:
            continue
        if event.HasField("restarted"):
            steps = {step: text for step, text in steps.items() if step < event.restarted.from_step}
        if event.HasField("text"):
            so_far = steps.get(event.step, "")
            assert event.text.offset == len(so_far), f"text of step {event.step} has a gap: {event}"
            steps[event.step] = so_far + event.text.text
    return "".join(text for _, text in sorted(steps.items()))
