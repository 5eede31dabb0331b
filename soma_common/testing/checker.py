"""Holds a run against the promises of the system, from what its clients saw and what outside witnesses counted.

    story = Story()
    story.sent(session, "key-1", "hello", expected="hello")     # before it goes out
    story.accepted(session, "key-1", receipt.message_id)        # its receipt
    story.delivered("demo", "line", delivery)                   # what an adapter of tenant demo was shown
    ...
    assert not story.violations()

Promises checked (docs/invariants.md): every accepted message has exactly one outcome (I1), outcomes of a session come
in the order of acceptance with dense positions (I3), a turn's journal has no gap and every call of a model or tool
belongs to a journaled step (I4), nothing arrives at another tenant (I5), and nothing of an older dispatch is streamed
after something of a newer one (I2). Of the arrival policies: a turn takes a run of its session's messages without a
gap, what is rejected aside; a turn ends as interrupted, cancelled or rejected only where somebody asked for it; and a
final is said by a model that had read every input. No I/O; all times are the caller's.

What watchers were shown is in `watched.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Final, TypeAlias

from google.protobuf.json_format import MessageToDict
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import ArrivalPolicy, Delivery, LiveEvent, Outcome, Step, ToolCall

from soma_common import ids
from soma_common.errors import reason_name
from soma_common.ids import SessionName, TurnName
from soma_common.testing.tool_server import RecordedToolCall

Journal: TypeAlias = Sequence[Step]
MAX_INPUTS: Final = 64
"""Most messages of one turn."""
_STOPS: Final = frozenset({ArrivalPolicy.ARRIVAL_POLICY_INTERRUPT, ArrivalPolicy.ARRIVAL_POLICY_ROLLBACK})
_JOINS: Final = _STOPS | {ArrivalPolicy.ARRIVAL_POLICY_ACCUMULATE, ArrivalPolicy.ARRIVAL_POLICY_STEER}
"""Policies under which a message may share its turn with the one before it."""


@dataclass(slots=True)
class SentMessage:
    """One message as its sender knows it."""

    text: str
    expected: str | None
    """Text of the right answer, where it is the only input of its turn; None: any."""
    ending: str | None = None
    """How the right answer ends, where it is the last input of a turn of several."""
    policy: ArrivalPolicy.ValueType = ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE
    position: int = 0
    """Its place among the accepted messages of its session, from 1; 0 while there is no receipt."""
    is_unknown: bool = False
    """The sender gave up without learning whether it is stored: at most one outcome."""


@dataclass(slots=True)
class _Thread:
    """One session, as its clients saw it."""

    sent: dict[bytes, SentMessage] = field(default_factory=dict)
    accepted: int = 0
    cancels: int = 0
    interrupts: int = 0
    deliveries: list[Delivery] = field(default_factory=list)


@dataclass
class Story:
    """Everything that the clients of one run saw."""

    tolerated: frozenset[int] = frozenset()
    """Error reasons with which a turn may end in this run; any other error is a violation."""
    id_form: str = ids.IDS_BESIDE
    """That of the database's message ids."""
    stale_live: list[tuple[int, LiveEvent]] = field(default_factory=list)
    """Live events of a dispatch that was over already when they came, with the newest dispatch by then."""
    _threads: dict[SessionName, _Thread] = field(default_factory=lambda: defaultdict(_Thread))
    _strange: list[str] = field(default_factory=list)
    _dispatches: dict[tuple[str, bytes], int] = field(default_factory=dict)
    _answered: set[bytes] = field(default_factory=set)

    # ---- what clients see

    def sent(
        self,
        name: SessionName,
        key: str,
        text: str,
        expected: str | None = None,
        policy: ArrivalPolicy.ValueType = ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE,
        ending: str | None = None,
    ) -> bytes:
        """A message is about to be sent; returns the id that it must get."""
        message_id = ids.message_id(name.tenant, name.agent, name.channel, name.session, key, self.id_form)
        self._threads[name].sent[message_id] = SentMessage(text, expected, ending, policy)
        return message_id

    def accepted(self, name: SessionName, key: str, message_id: bytes) -> None:
        """Its receipt has come. Messages of a session are told here in the order they were accepted."""
        thread = self._threads[name]
        message = thread.sent.get(message_id)
        if message is None:
            self._strange.append(f"{name}: the receipt of key {key} names message {message_id.hex()}")
            return
        thread.accepted += 1
        message.position = thread.accepted

    def not_known(self, message_id: bytes, name: SessionName) -> None:
        """The sender gave up on a message whose fate it does not know."""
        self._threads[name].sent[message_id].is_unknown = True

    def cancelled(self, name: SessionName) -> None:
        """A cancel is about to be sent: one turn of the session, at most, may end as cancelled for it."""
        self._threads[name].cancels += 1

    def interrupted(self, name: SessionName) -> None:
        """An interrupt by hand is about to be sent: one turn of the session may end as interrupted for it."""
        self._threads[name].interrupts += 1

    def delivered(self, tenant: str, channel: str, delivery: Delivery) -> None:
        """An adapter of this tenant and channel was shown a delivery, after the client's own removal of repetitions."""
        name = SessionName(tenant, delivery.agent, channel, delivery.session)
        if name not in self._threads:
            self._strange.append(f"an adapter of {tenant}/{channel} got a delivery of {name}, where nothing was sent")
        self._threads[name].deliveries.append(delivery)
        self._answered.update(delivery.message_ids)

    def live(self, event: LiveEvent, stream: str = "") -> None:
        """A live event was shown on a stream of an adapter. Another stream may be behind it: its gateway or its line is
        slower.
        """
        newest = self._dispatches.get((stream, event.turn_id), 0)
        if event.dispatch < newest:
            self.stale_live.append((newest, event))
        else:
            self._dispatches[stream, event.turn_id] = event.dispatch

    # ---- what it comes to

    def counts(self) -> dict[str, int]:
        """Messages sent, accepted, answered, and those of them whose turn was stopped, for reports."""
        threads = self._threads.values()
        return {
            "sent": sum(len(thread.sent) for thread in threads),
            "accepted": sum(thread.accepted for thread in threads),
            "answered": sum(len(thread.deliveries) for thread in threads),
            "cancelled": sum(delivery.outcome == Outcome.OUTCOME_CANCELLED for _, delivery in self.turns()),
        }

    def outcomes(self) -> Counter[str]:
        """How many turns ended how, by the outcome's name in lower case."""
        return Counter(Outcome.Name(d.outcome).removeprefix("OUTCOME_").lower() for _, d in self.turns())

    def texts(self, delivery: Delivery, name: SessionName) -> list[str]:
        """What was said in the messages that a delivery answers."""
        sent = self._threads[name].sent
        return [sent[message_id].text for message_id in delivery.message_ids if message_id in sent]

    def unanswered(self) -> list[bytes]:
        """Accepted messages without an outcome."""
        return [
            message_id
            for thread in self._threads.values()
            for message_id, message in thread.sent.items()
            if message.position and message_id not in self._answered
        ]

    def turns(self) -> Iterator[tuple[TurnName, Delivery]]:
        """Every turn that was answered."""
        for name, thread in self._threads.items():
            for delivery in thread.deliveries:
                yield TurnName(name, delivery.turn_id), delivery

    def violations(self) -> list[str]:
        """Every promise that was broken, in words; empty when all were kept. Call it when everything is answered."""
        found = list(self._strange)
        for name, thread in self._threads.items():
            found += (f"{name}: {problem}" for problem in self._of_thread(name, thread))
        found += (
            f"turn {event.turn_id.hex()}: live event of dispatch {event.dispatch} after one of {newest} "
            f"({event.WhichOneof('event')} of step {event.step}, session {event.session})"
            for newest, event in self.stale_live
        )
        return found

    def _of_thread(self, name: SessionName, thread: _Thread) -> Iterator[str]:
        answers = [message_id for delivery in thread.deliveries for message_id in delivery.message_ids]
        counted = Counter(answers)
        for message_id, message in thread.sent.items():
            times = counted.pop(message_id, 0)
            if message.position and times != 1:
                yield f"accepted message {message_id.hex()} ({message.text!r}) has {times} outcomes"
            elif times > 1:
                yield f"message {message_id.hex()} without receipt has {times} outcomes"
        for message_id in counted:
            yield f"an outcome names message {message_id.hex()}, which was not sent in this session"
        places = [
            (thread.sent[m].position, thread.sent[m].policy, delivery)
            for delivery in thread.deliveries
            if delivery.outcome != Outcome.OUTCOME_REJECTED
            for m in delivery.message_ids
            if m in thread.sent and thread.sent[m].position
        ]
        late = next((n for n in range(1, len(places)) if places[n][0] <= places[n - 1][0]), 0)
        if late:
            around = "; ".join(
                f"{place} {ArrivalPolicy.Name(policy)[15:].lower()}, {Outcome.Name(delivery.outcome)[8:].lower()} of "
                f"turn {delivery.turn_id.hex()}"
                for place, policy, delivery in places[max(late - 3, 0) : late + 2]
            )
            yield f"accepted in order 1..{thread.accepted}, answered in order {[p[0] for p in places]}: {around}"
        repeated = [i for i, times in Counter(d.delivery_id for d in thread.deliveries).items() if times > 1]
        if repeated:
            yield f"deliveries shown more than once: {[delivery_id.hex() for delivery_id in repeated]}"
        positions = [delivery.position for delivery in thread.deliveries]
        if positions != list(range(1, len(positions) + 1)):
            yield f"delivery positions are {positions}"
        stopped = sum(delivery.outcome == Outcome.OUTCOME_CANCELLED for delivery in thread.deliveries)
        if stopped > thread.cancels:
            yield f"{stopped} turns were cancelled by {thread.cancels} cancels"
        interrupted = sum(delivery.outcome == Outcome.OUTCOME_INTERRUPTED for delivery in thread.deliveries)
        reasons = thread.interrupts + sum(message.policy in _STOPS for message in thread.sent.values())
        if interrupted > reasons:
            yield f"{interrupted} turns were interrupted for {reasons} reasons"
        for delivery in thread.deliveries:
            yield from self._of_delivery(thread, delivery)

    def _of_delivery(self, thread: _Thread, delivery: Delivery) -> Iterator[str]:
        inputs = [thread.sent[m] for m in delivery.message_ids if m in thread.sent]
        turn = delivery.turn_id.hex()
        if not delivery.message_ids or len(delivery.message_ids) > MAX_INPUTS:
            yield f"turn {turn} answers {len(delivery.message_ids)} messages"
        if len(inputs) > 1 and not any(message.policy in _JOINS for message in inputs):
            yield f"turn {turn} answers {len(inputs)} messages, and none of them asked for that"
        if delivery.outcome == Outcome.OUTCOME_REJECTED:
            if delivery.error.reason != ErrorReason.ERROR_REASON_TURN_RUNNING:
                yield f"turn {turn} was rejected with {_told(delivery)}"
            if [message.policy for message in inputs] != [ArrivalPolicy.ARRIVAL_POLICY_REJECT]:
                yield f"turn {turn} was rejected, and that was not its message's policy"
        elif delivery.outcome == Outcome.OUTCOME_ERROR:
            if delivery.error.reason not in self.tolerated:
                yield f"turn {delivery.turn_id.hex()} ended with {_told(delivery)}"
        elif delivery.outcome in (Outcome.OUTCOME_CANCELLED, Outcome.OUTCOME_INTERRUPTED):
            return
        elif delivery.outcome != Outcome.OUTCOME_FINAL:
            yield f"turn {delivery.turn_id.hex()} ended as {Outcome.Name(delivery.outcome)}"
        else:
            said = "".join(part.text for part in delivery.message.parts)
            last = inputs[-1] if inputs else SentMessage("", None)
            right = last.expected if len(inputs) == 1 else last.ending
            if right is not None and said != right and not (len(inputs) > 1 and said.endswith(right)):
                yield f"{last.text!r} was answered with {said!r} instead of {right!r}"


def journal_violations(
    journals: Mapping[str, Journal],
    model_calls: Iterable[tuple[str, int]],
    tool_calls: Sequence[RecordedToolCall],
    once_only: frozenset[str],
) -> list[str]:
    """What the journals of ended turns (by turn, in hex) and the outside witnesses of the same turns do not agree on.

    `model_calls` are (turn, step) as the model endpoint saw them; `once_only` are the tools that nobody may call twice
    under one key.
    """
    found: list[str] = []
    model_saw = set(model_calls)
    calls_by_key: dict[str, list[RecordedToolCall]] = defaultdict(list)
    for recorded in tool_calls:
        calls_by_key[recorded.key].append(recorded)
    journaled_keys: set[str] = set()
    for turn, journal in journals.items():
        numbers = [step.number for step in journal]
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"turn {turn}: the journal's steps are {numbers}")
        for step, after in zip_longest(journal, journal[1:]):
            kind = step.body.WhichOneof("body")
            if _is_of_model(step) and (turn, step.number) not in model_saw:
                found.append(f"turn {turn}: the model was never called for step {step.number}")
            if kind != "model_reply":
                continue
            if after is None and step.body.model_reply.tool_calls:
                found.append(f"turn {turn}: it ended with open calls")
            for call in step.body.model_reply.tool_calls:
                key = ids.call_key(bytes.fromhex(turn), step.number, call.index)
                journaled_keys.add(key)
                found += (f"{key}: {problem}" for problem in _of_call(call, calls_by_key[key], after, once_only))
    for key in sorted(set(calls_by_key) - journaled_keys):
        if calls_by_key[key] and key.partition("/")[0] in journals:
            found.append(f"{key}: called, but no journaled step asks for it")
    return found


def effects_out_of_turn(
    tool_calls: Iterable[RecordedToolCall], once_only: frozenset[str], answered: Iterable[str]
) -> list[str]:
    """Effects that nobody may have twice, in turns that nobody was answered: what was dropped for a new try must have
    had none. `answered` are turns in hex.
    """
    known = set(answered)
    return [
        f"{call.key}: {call.tool} was called in a turn that nobody was answered"
        for call in tool_calls
        if call.tool in once_only and call.turn not in known
    ]


def unread_inputs(
    turns: Iterable[tuple[str, Sequence[str]]],
    journals: Mapping[str, Journal],
    model_read: Mapping[tuple[str, int, int], Sequence[str]],
) -> list[str]:
    """Inputs that the model had not read when it said the final of their turn.

    `turns` are (turn in hex, texts of its inputs) of turns that ended with a final; `model_read` is what the model was
    given to read, as texts, by (turn, step, dispatch) as the model endpoint saw it.
    """
    found = []
    for turn, texts in turns:
        last = journals[turn][-1] if journals.get(turn) else None
        if last is None:
            found.append(f"turn {turn}: it has an answer and no journal")
            continue
        read = model_read.get((turn, last.number, last.dispatch))
        if read is None:
            found.append(f"turn {turn}: its final is of dispatch {last.dispatch}, which never called the model for it")
            continue
        found += (
            f"turn {turn}: {text!r} was answered, and the model had not read it" for text in texts if text not in read
        )
    return found


def mixed_up(model_read: Iterable[tuple[str, Sequence[str]]], owner: Mapping[str, str]) -> list[str]:
    """Turns whose model was given something to read that was said in another session.

    `model_read` are (turn, texts of the users' messages that the model read); in `owner` are, by turn, the words that
    everything begins with that is said in its session.
    """
    return [
        f"turn {turn} of {owner[turn]!r}: the model was given {text!r} to read"
        for turn, texts in model_read
        if turn in owner
        for text in texts
        if not text.startswith(owner[turn])
    ]


def _is_of_model(step: Step) -> bool:
    """Whether a model said it, and not the router of what it kept of an interrupted turn."""
    body = step.body
    return body.HasField("model_reply") or (
        body.HasField("final") and not body.final.message.metadata.get("interrupted")
    )


def _of_call(
    call: ToolCall, recorded: Sequence[RecordedToolCall], after: Step | None, once_only: frozenset[str]
) -> Iterator[str]:
    """One journaled call against what the tool's endpoint saw of it."""
    if call.tool in once_only and len(recorded) > 1:
        yield f"{call.tool} was called {len(recorded)} times"
    asked = MessageToDict(call.arguments)
    for seen in recorded:
        if seen.arguments != asked:
            yield f"{call.tool} was called with {seen.arguments}, journaled is {asked}"
    if after is None or after.body.WhichOneof("body") != "tool_results":
        return
    result = next((r for r in after.body.tool_results.results if r.index == call.index), None)
    if result is None:
        yield f"{call.tool} has no result in the journal"
    elif result.error.reason == ErrorReason.ERROR_REASON_TOOL_CANCELLED:
        if recorded:
            yield f"{call.tool} was called, and the journal says that it was cancelled before it ran"
    elif not recorded and not _says_that_nobody_answered(result.error):
        told = f" ({reason_name(result.error.reason)}: {result.error.message})" if result.HasField("error") else ""
        yield f"{call.tool} has a result in the journal, but was never called{told}"


def _says_that_nobody_answered(error: Error) -> bool:
    """Whether the tool gateway tells of a call that no endpoint answered: it cannot be known, or the endpoint was out
    of reach or too slow. A gateway that was stopped as it connected finds its time over before the call has left.
    """
    return error.reason == ErrorReason.ERROR_REASON_TOOL_OUTCOME_UNKNOWN or (
        error.reason == ErrorReason.ERROR_REASON_TOOL_FAILED and "http_status" not in error.metadata
    )


def _told(delivery: Delivery) -> str:
    return f"{reason_name(delivery.error.reason)}: {delivery.error.message}"
