"""What watchers of turns were shown, held against each other and against the journals.

    watcher = Watched("gateway-1")
    watcher.saw(live_event)                     # whatever comes, in the order it comes
    watcher.ended(turn_hex, delivery)
    ...
    assert not watched_violations([watcher, ...], journals)

Whoever watches a step sees the same of it, at whatever gateway and however often the stream is lost: the same text at
the same place, the same calls and results; and it is what the journal says once the step is in it. Framing may differ,
and what a watcher did not see says nothing. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Step

Place = tuple[str, int, int]
"""Turn in hex, dispatch, step."""


@dataclass
class Watched:
    """What one watcher was shown. `stale` are events of a dispatch after one of a newer one on the same stream: another
    stream may be at a gateway that is behind, and whoever changes it compares dispatches itself.
    """

    name: str
    texts: dict[Place, list[tuple[int, str]]] = field(default_factory=dict)
    """Pieces of text and their offsets, in the order shown."""
    calls: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    """By turn, step and index: the call, serialized."""
    results: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    outcomes: dict[str, Delivery] = field(default_factory=dict)
    stale: list[Place] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """What was shown twice and was not the same the second time."""
    gaps: int = 0
    """Pieces of text before which something was missing."""
    events: int = 0
    _newest: dict[str, int] = field(default_factory=dict)
    _length: dict[Place, int] = field(default_factory=dict)

    def came_back(self) -> None:
        """It has another stream."""
        self._newest.clear()

    def saw(self, event: LiveEvent) -> None:
        """It was shown a live event."""
        self.events += 1
        turn = event.turn_id.hex()
        place = (turn, event.dispatch, event.step)
        if event.dispatch < self._newest.get(turn, 0):
            self.stale.append(place)
            return
        self._newest[turn] = event.dispatch
        match event.WhichOneof("event"):
            case "text":
                have = self._length.get(place, 0)
                self.gaps += event.text.offset > have
                self._length[place] = max(have, event.text.offset + len(event.text.text))
                self.texts.setdefault(place, []).append((event.text.offset, event.text.text))
            case "tool_call":
                self._note(self.calls, (turn, event.step, event.tool_call.index), event.tool_call)
            case "tool_result":
                self._note(self.results, (turn, event.step, event.tool_result.index), event.tool_result)
            case "ended":
                self.ended(turn, event.ended)

    def ended(self, turn: str, outcome: Delivery) -> None:
        """It was told how a turn ended."""
        before = self.outcomes.setdefault(turn, outcome)
        if _told(before) != _told(outcome):
            self.changed.append(f"turn {turn} had two ends")

    def _note(self, seen: dict[tuple[str, int, int], bytes], key: tuple[str, int, int], shown: Message) -> None:
        text = shown.SerializeToString(deterministic=True)
        if seen.setdefault(key, text) != text:
            self.changed.append(f"turn {key[0]} step {key[1]}: call {key[2]} was shown in two ways")


def watched_violations(
    watchers: Sequence[Watched], journals: Mapping[str, Sequence[Step]], answers: Mapping[str, Delivery]
) -> list[str]:
    """What watchers were shown that is not what another was shown, the journal says, or the adapter got. `answers` are
    by turn, like the journals.
    """
    found: list[str] = []
    for watcher in watchers:
        found += (f"{watcher.name}: {problem}" for problem in watcher.changed)
        found += (f"{watcher.name}: stale event of {place}" for place in watcher.stale)
        for turn, outcome in watcher.outcomes.items():
            if turn in answers and _told(outcome) != _told(answers[turn]):
                found.append(f"{watcher.name}: turn {turn} ended otherwise for its adapter")
    found += _torn_texts(watchers, journals)
    for step_of, what in ((_journaled_calls, "calls"), (_journaled_results, "results")):
        said = {key: text for turn, journal in journals.items() for key, text in step_of(turn, journal)}
        for watcher in watchers:
            shown = watcher.calls if what == "calls" else watcher.results
            found += (
                f"{watcher.name}: turn {key[0]} step {key[1]}: what was shown of its {what} is not in the journal"
                for key, text in shown.items()
                if key[0] in journals and said.get(key) != text
            )
    return found


def _torn_texts(watchers: Iterable[Watched], journals: Mapping[str, Sequence[Step]]) -> Iterable[str]:
    """Texts of one step of one dispatch that differ at some place, between watchers or from the journal."""
    shown_to_others: dict[Place, dict[int, str]] = {}
    for watcher in watchers:
        for place, pieces in watcher.texts.items():
            right = _journaled_text(journals, place)
            known = shown_to_others.setdefault(place, {}) if right is None else dict(enumerate(right))
            for offset, piece in pieces:
                for at, character in enumerate(piece, offset):
                    if (known.setdefault(at, character) if right is None else known.get(at)) != character:
                        turn, dispatch, step = place
                        yield f"{watcher.name}: turn {turn} dispatch {dispatch} step {step}: {piece!r} at {offset}"
                        break


def _journaled_text(journals: Mapping[str, Sequence[Step]], place: Place) -> str | None:
    """The text of a step as it was journaled by this dispatch or an earlier one; None: what was shown was taken back,
    or is of a turn whose journal is not at hand.
    """
    turn, dispatch, number = place
    for step in journals.get(turn, ()):
        if step.number == number and step.dispatch <= dispatch:
            return _text_of(step)
    return None


def _text_of(step: Step) -> str | None:
    match step.body.WhichOneof("body"):
        case "model_reply":
            return step.body.model_reply.text
        case "final" if not step.body.final.message.metadata.get("interrupted"):
            # Before it are the interim replies, which have steps of their own.
            return "".join(part.text for part in step.body.final.message.parts[-1:])
        case _:
            return None


def _journaled_calls(turn: str, journal: Sequence[Step]) -> Iterable[tuple[tuple[str, int, int], bytes]]:
    for step in journal:
        for call in step.body.model_reply.tool_calls:
            yield (turn, step.number, call.index), call.SerializeToString(deterministic=True)


def _journaled_results(turn: str, journal: Sequence[Step]) -> Iterable[tuple[tuple[str, int, int], bytes]]:
    for step in journal:
        for result in step.body.tool_results.results:
            yield (turn, step.number, result.index), result.SerializeToString(deterministic=True)


def _told(delivery: Delivery) -> tuple[object, ...]:
    """What is the same of an outcome for everybody: a delivery has attempts and places that a watcher's has not."""
    message, error = delivery.message.SerializeToString(deterministic=True), delivery.error.reason
    return delivery.outcome, message, error, tuple(delivery.message_ids)
