"""However live events and snapshots overlap, get lost or repeat, every watcher shows the same content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, TextDelta, ToolCall, ToolResult, TurnRestarted, TurnState

from soma_common.live_merge import TurnMerge

TURN, MESSAGE = b"t" * 16, b"m" * 16
Place = tuple[int, str, int]


@dataclass
class Script:
    """A turn as its router tells it: batches of events in order, and a snapshot after each. Batches are lost whole."""

    batches: list[list[LiveEvent]] = field(default_factory=list)
    snapshots: list[list[LiveEvent]] = field(default_factory=list)
    journal: list[LiveEvent] = field(default_factory=list)
    dispatch: int = 1
    step: int = 1
    text: str = ""

    def begin(self) -> None:
        self._tell(self._state())

    def say(self, text: str) -> None:
        self._tell(self._event(text=TextDelta(offset=len(self.text), text=text)), said=text)

    def call_tools(self, count: int) -> None:
        """Two steps: the calls, then their results; each followed by the next state."""
        calls = [self._event(tool_call=ToolCall(index=n, tool="t")) for n in range(count)]
        whole = self._event(text=TextDelta(text=self.text)) if self.text else None
        self._journaled([*([whole] if whole else []), *calls])
        self._journaled([self._event(tool_result=ToolResult(index=n, tool="t")) for n in range(count)])

    def crash(self) -> None:
        """The brain dies: a new dispatch goes on from the journal."""
        self.dispatch += 1
        self.text = ""
        for event in self.journal:
            event.dispatch = self.dispatch
        self._tell(self._event(restarted=TurnRestarted(from_step=self.step)), self._state())

    def end(self) -> None:
        self.journal, self.text = [], ""
        event = self._event(ended=Delivery(turn_id=TURN, message_ids=[MESSAGE]))
        self.batches.append([event])
        self.snapshots.append([event])

    @property
    def events(self) -> list[LiveEvent]:
        return [event for batch in self.batches for event in batch]

    def _journaled(self, events: list[LiveEvent]) -> None:
        self.step += 1
        self.text = ""
        self.journal += events
        self._tell(*events, self._state())

    def _state(self) -> LiveEvent:
        return self._event(state=TurnState.TURN_STATE_THINKING, message_ids=[MESSAGE])

    def _event(self, **content: object) -> LiveEvent:
        return LiveEvent(turn_id=TURN, dispatch=self.dispatch, step=self.step, **content)  # type: ignore[arg-type]

    def _tell(self, *events: LiveEvent, said: str = "") -> None:
        self.text += said
        self.batches.append([_copy(event) for event in events])
        so_far = [self._state(), *self.journal]
        if self.text:
            so_far.append(self._event(text=TextDelta(text=self.text)))
        self.snapshots.append([_copy(e) for e in so_far])


def _copy(event: LiveEvent) -> LiveEvent:
    copy = LiveEvent()
    copy.CopyFrom(event)
    return copy


def screen(events: Iterable[LiveEvent], *, strict: bool = True) -> tuple[dict[int, str], set[Place], bool]:
    """What a watcher shows: the text of each step, tools by place, and whether the turn has ended."""
    texts: dict[int, str] = {}
    tools: set[Place] = set()
    ended = False
    for event in events:
        assert not ended
        match event.WhichOneof("event"):
            case "text":
                before = texts.get(event.step, "")
                assert not strict or event.text.offset == len(before), "text with a gap or a repetition"
                texts[event.step] = before[: event.text.offset] + event.text.text
            case "tool_call" | "tool_result" as kind:
                index = event.tool_call.index if kind == "tool_call" else event.tool_result.index
                assert (event.step, kind, index) not in tools, "a tool shown twice"
                tools.add((event.step, kind, index))
            case "restarted":
                texts = {step: text for step, text in texts.items() if step < event.restarted.from_step}
                tools = {place for place in tools if place[0] < event.restarted.from_step}
            case "ended":
                ended = True
    return texts, tools, ended


moves = st.lists(
    st.one_of(
        st.text(alphabet="abcdé🎈", min_size=1, max_size=4).map(lambda text: ("say", text)),
        st.integers(1, 3).map(lambda count: ("call_tools", count)),
        st.just(("crash", None)),
    ),
    max_size=12,
)


def script_of(steps: list[tuple[str, object]]) -> Script:
    script = Script()
    script.begin()
    for name, argument in steps:
        getattr(script, name)(*([] if argument is None else [argument]))
    script.end()
    return script


@given(moves, st.data())
def test_lossy_live_events_and_snapshots_give_what_a_perfect_watcher_sees(
    steps: list[tuple[str, object]], data: st.DataObject
) -> None:
    script = script_of(steps)
    perfect = screen(script.events[:-1], strict=False)
    merge = TurnMerge(message_id=MESSAGE)
    shown: list[LiveEvent] = []
    last = len(script.batches) - 1
    joined = data.draw(st.integers(0, last), label="joined")
    for at in range(joined, last):
        fate = data.draw(st.sampled_from(["seen", "seen", "seen", "lost", "twice"]), label="fate")
        for _ in range({"seen": 1, "lost": 0, "twice": 2}[fate]):
            shown += merge.live(script.batches[at])
        if merge.gap or at == joined or data.draw(st.booleans(), label="asked"):
            behind = data.draw(st.integers(max(at - 1, joined), at), label="answer as of")
            shown += merge.snapshot(script.snapshots[behind])
    shown += merge.snapshot(script.snapshots[-2])
    assert screen(shown) == perfect
    shown += merge.live(script.batches[-1])
    assert screen(shown)[2]
    assert merge.live(script.events) == []


def test_without_loss_nothing_is_asked_for() -> None:
    script = script_of([("say", "a"), ("call_tools", 2), ("say", "b"), ("crash", None), ("say", "c")])
    merge = TurnMerge(message_id=MESSAGE)
    shown = merge.live(script.events)
    assert not merge.gap
    assert screen(shown) == screen(script.events, strict=False)


def test_other_turns_are_not_shown_and_do_not_ask() -> None:
    merge = TurnMerge(message_id=MESSAGE)
    other = LiveEvent(turn_id=b"o" * 16, dispatch=1, step=1, text=TextDelta(text="x"), message_ids=[b"x" * 16])
    assert merge.live([other] * 3) == []
    assert not merge.gap
    merge.unknown()
    assert merge.snapshot(script_of([]).snapshots[0])


def test_a_zombies_older_dispatch_is_ignored() -> None:
    merge = TurnMerge(turn_id=TURN)
    merge.snapshot([LiveEvent(turn_id=TURN, dispatch=2, step=1, text=TextDelta(text="new"))])
    assert merge.live([LiveEvent(turn_id=TURN, dispatch=1, step=1, text=TextDelta(offset=3, text="old"))]) == []


def test_a_lost_restart_is_announced_by_the_watcher() -> None:
    merge = TurnMerge(turn_id=TURN)
    merge.snapshot([LiveEvent(turn_id=TURN, dispatch=1, step=2, text=TextDelta(text="wrong"))])
    assert merge.live([LiveEvent(turn_id=TURN, dispatch=2, step=2, text=TextDelta(offset=1, text="ight"))]) == []
    assert merge.gap
    shown = merge.snapshot([LiveEvent(turn_id=TURN, dispatch=2, step=2, text=TextDelta(text="right"))])
    assert [event.WhichOneof("event") for event in shown] == ["restarted", "text"]
    assert shown[0].restarted.from_step == 2
    assert screen(shown)[0] == {2: "right"}


def test_a_turn_that_names_the_message_is_ours_only_once_a_snapshot_says_so() -> None:
    """The key was used before for other content, whose turn still runs: what it does is not shown."""
    merge = TurnMerge(message_id=MESSAGE, by_snapshot=True)
    others = script_of([("say", "not ours")])
    assert merge.live(others.events[:2]) == []
    assert merge.named
    assert merge.snapshot([]) == []
    refusal = LiveEvent(turn_id=b"r" * 16, dispatch=1, step=1, ended=Delivery(turn_id=b"r" * 16, message_ids=[MESSAGE]))
    assert merge.live([*others.events[2:], refusal]) == []
    assert merge.snapshot([refusal]) == [refusal]
    assert merge.ended


def test_what_happens_while_a_snapshot_is_asked_for_is_shown_after_it() -> None:
    script = script_of([("say", "a"), ("say", "b")])
    merge = TurnMerge(message_id=MESSAGE, by_snapshot=True)
    assert merge.live(script.events) == []
    merge.unknown()  # an answer from before the event that named our message
    shown = merge.snapshot(script.snapshots[0])
    assert screen(shown) == screen(script.events, strict=False)
