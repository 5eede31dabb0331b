"""However live events and pages overlap, get lost or repeat, every watcher shows the same content."""

from __future__ import annotations

from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import (
    Delivery,
    LiveEvent,
    Outcome,
    TextDelta,
    ToolCall,
    ToolResult,
    TurnRestarted,
    TurnState,
    WatchPosition,
)
from soma.router.v1.outbound_pb2 import WatchSnapshot

from soma_common.live_merge import MAX_HELD, Watched, WatchMerge

TURN, OTHER, MESSAGE = b"t" * 16, b"o" * 16, b"m" * 16


def event(step: int = 1, dispatch: int = 1, turn: bytes = TURN, number: int = 1, **content: object) -> LiveEvent:
    return LiveEvent(turn_id=turn, turn_number=number, dispatch=dispatch, step=step, **content)  # type: ignore[arg-type]


def begun(turn: bytes = TURN, number: int = 1, dispatch: int = 1, step: int = 1) -> LiveEvent:
    return event(step, dispatch, turn, number, state=TurnState.TURN_STATE_THINKING, message_ids=[MESSAGE])


def text(offset: int, said: str, step: int = 1, dispatch: int = 1, turn: bytes = TURN) -> LiveEvent:
    return event(step, dispatch, turn, text=TextDelta(offset=offset, text=said))


def journaled(step: int, size: int, dispatch: int = 1) -> LiveEvent:
    """The state behind a step, which says how large the step was."""
    return event(step + 1, dispatch, state=TurnState.TURN_STATE_REFLECTING, step_size=size, message_ids=[MESSAGE])


def final(said: str, step: int = 1, dispatch: int = 1, turn: bytes = TURN, number: int = 1) -> LiveEvent:
    message = Message(parts=[Part(text=said)])
    delivery = Delivery(turn_id=turn, outcome=Outcome.OUTCOME_FINAL, message_ids=[MESSAGE], message=message)
    return event(step, dispatch, turn, number, ended=delivery)


def ended(outcome: Outcome.ValueType, step: int = 1, size: int = 0, turn: bytes = TURN, number: int = 1) -> LiveEvent:
    delivery = Delivery(turn_id=turn, outcome=outcome, message_ids=[MESSAGE])
    return event(step, 1, turn, number, ended=delivery, step_size=size)


def page(*events: LiveEvent, more: bool = False) -> WatchSnapshot:
    return WatchSnapshot(known=True, events=events, more=more)


def kinds(shown: list[Watched]) -> list[str]:
    return [watched.event.WhichOneof("event") or "" for watched in shown]


def said(shown: list[Watched]) -> str:
    return "".join(watched.event.text.text for watched in shown)


def of_turn() -> WatchMerge:
    merge = WatchMerge(turn_id=TURN)
    merge.page(page(begun()))
    return merge


def test_without_loss_nothing_is_asked_for() -> None:
    merge = of_turn()
    shown = merge.live(
        [text(0, "a"), event(tool_call=ToolCall(tool="t"), next_offset=2), journaled(1, 2)]
        + [event(2, tool_result=ToolResult(tool="t"), next_offset=1), journaled(2, 1), text(0, "b", 3), final("b", 3)]
    )
    assert not merge.gap
    assert kinds(shown) == ["text", "tool_call", "state", "tool_result", "state", "text", "ended"]
    assert merge.ended


def test_a_step_of_which_a_part_was_lost_is_asked_for() -> None:
    merge = of_turn()
    assert kinds(merge.live([event(tool_call=ToolCall(tool="t"), next_offset=1), journaled(1, 2)])) == ["tool_call"]
    assert merge.gap
    missing = event(tool_call=ToolCall(index=1, tool="u"), next_offset=2)
    assert kinds(merge.page(page(missing, journaled(1, 2), begun(step=2)))) == ["tool_call", "state"]
    assert not merge.gap


def test_the_rest_of_an_answer_comes_with_its_end() -> None:
    merge = of_turn()
    shown = merge.live([text(0, "hel"), final("hello")])
    assert (said(shown), kinds(shown)) == ("hello", ["text", "text", "ended"])


def test_an_answer_that_repeats_interim_replies_shows_what_is_new() -> None:
    merge = of_turn()
    end = final("last", 2)
    end.ended.message.parts.insert(0, Part(text="first"))
    assert said(merge.live([text(0, "first"), journaled(1, 5), text(0, "la", 2), end])) == "firstlast"


def test_a_zombies_older_dispatch_is_ignored() -> None:
    merge = WatchMerge(turn_id=TURN)
    merge.page(page(begun(dispatch=2), text(0, "new", dispatch=2)))
    assert merge.live([text(3, "old", dispatch=1), final("old", dispatch=1)]) == []
    assert not merge.gap


def test_the_answer_of_an_owner_that_is_one_no_more_is_asked_again() -> None:
    merge = of_turn()
    merge.live([event(1, 2, restarted=TurnRestarted(from_step=1))])
    assert merge.page(page(begun(), text(0, "old"))) == []
    assert merge.gap


def test_a_lost_restart_is_announced_by_the_watcher() -> None:
    merge = of_turn()
    merge.live([text(0, "wrong")])
    assert merge.live([text(1, "ight", dispatch=2)]) == []
    assert merge.gap
    shown = merge.page(page(begun(dispatch=2), text(0, "right", dispatch=2)))
    assert kinds(shown) == ["restarted", "state", "text"]
    assert (shown[0].event.restarted.from_step, said(shown)) == (1, "right")


def test_text_that_was_never_journaled_is_taken_back_before_the_end() -> None:
    merge = of_turn()
    merge.live([text(0, "half a th"), ended(Outcome.OUTCOME_CANCELLED)])
    assert merge.gap
    shown = merge.page(page(ended(Outcome.OUTCOME_CANCELLED)))
    assert kinds(shown) == ["restarted", "ended"]


def test_a_resumed_step_goes_on_where_it_was_left() -> None:
    merge = WatchMerge(turn_id=TURN, after=WatchPosition(turn_id=TURN, dispatch=1, step=2, offset=3))
    shown = merge.page(page(text(3, "lo", 2), journaled(2, 5), begun(step=3)))
    assert kinds(shown) == ["text", "state"]


def test_a_resumed_step_that_another_dispatch_did_is_taken_back_and_shown_whole() -> None:
    merge = WatchMerge(turn_id=TURN, after=WatchPosition(turn_id=TURN, dispatch=1, step=2, offset=3))
    shown = merge.page(page(text(0, "hello", 2, 2), journaled(2, 5, 2), begun(step=3, dispatch=2)))
    assert kinds(shown) == ["restarted", "text", "state"]
    assert said(shown) == "hello"


def test_nothing_follows_the_end_of_a_turn() -> None:
    assert WatchMerge(turn_id=TURN, after=WatchPosition(turn_id=TURN, dispatch=1, step=2, ended=True)).ended


def test_a_position_names_what_was_shown_and_no_more() -> None:
    merge = of_turn()
    positions = [watched.position for watched in merge.live([text(0, "ab"), journaled(1, 2), text(0, "c", 2)])]
    assert [(p.step, p.offset) for p in positions] == [(1, 2), (2, 0), (2, 1)]


def test_more_than_is_held_while_a_page_is_asked_for_is_asked_again() -> None:
    merge = WatchMerge(turn_id=TURN)
    merge.live([text(at, "x") for at in range(MAX_HELD + 5)])
    shown = merge.page(page(begun()))
    assert merge.gap
    assert said(shown) == ""
    assert len(said(merge.page(page(begun(), text(0, "x" * (MAX_HELD + 5)))))) == MAX_HELD + 5


def test_the_whole_turn_in_one_answer_of_the_release_before_is_understood() -> None:
    """Its routers name no sizes and no numbers of turns, and put the running state before all steps."""
    merge = WatchMerge(turn_id=TURN)
    call, result = ToolCall(tool="t"), ToolResult(tool="t")
    running = event(3, 1, number=0, state=TurnState.TURN_STATE_REFLECTING, message_ids=[MESSAGE])
    steps = [text(0, "a"), event(1, number=0, tool_call=call), event(2, number=0, tool_result=result)]
    shown = merge.page(page(running, *steps, text(0, "b", 3)))
    assert kinds(shown) == ["text", "tool_call", "tool_result", "state", "text"]
    assert merge.page(page(running, *steps, text(0, "bc", 3)))[0].event.text.text == "c"
    assert kinds(merge.live([final("bcd", 3)])) == ["text", "ended"]


# ---- by message


def test_other_turns_are_not_shown_and_do_not_ask() -> None:
    merge = WatchMerge(message_id=MESSAGE)
    merge.unknown()
    other = event(turn=OTHER, text=TextDelta(text="x"), message_ids=[b"x" * 16])
    assert merge.live([other] * 3) == []
    assert not merge.gap
    assert kinds(merge.live([begun(), text(0, "a")])) == ["state", "text"]


def test_a_turn_that_names_the_message_is_ours_only_once_a_page_says_so() -> None:
    """The key was used before for other content, whose turn still runs: what it does is not shown."""
    merge = WatchMerge(message_id=MESSAGE, by_snapshot=True)
    merge.unknown()
    assert merge.live([begun(OTHER), text(0, "not ours", turn=OTHER)]) == []
    assert merge.named
    assert merge.gap
    assert kinds(merge.page(page(ended(Outcome.OUTCOME_ERROR)))) == ["ended"]
    assert merge.ended


def test_what_happens_while_a_page_is_asked_for_is_shown_after_it() -> None:
    merge = WatchMerge(message_id=MESSAGE, by_snapshot=True)
    assert merge.live([begun(), text(0, "a"), text(1, "b")]) == []
    merge.unknown()  # an answer from before the event that named our message
    assert said(merge.page(page(begun(), text(0, "a")))) == "ab"


def test_a_message_that_goes_over_to_another_turn_is_followed_there() -> None:
    merge = WatchMerge(message_id=MESSAGE)
    merge.page(page(begun()))
    shown = merge.live([ended(Outcome.OUTCOME_ABSORBED), begun(OTHER, 2), text(0, "b", turn=OTHER)])
    assert kinds(shown) == ["ended"]
    assert not merge.ended
    assert merge.about_message
    shown = merge.page(page(ended(Outcome.OUTCOME_ABSORBED)))  # the store knows of no other turn yet, the bus does
    assert kinds(shown) == ["state", "text"]
    assert kinds(merge.live([final("b", turn=OTHER, number=2)])) == ["ended"]
    assert merge.ended


# ---- of a session


def test_a_session_goes_from_turn_to_turn_without_asking() -> None:
    merge = WatchMerge(session=True)
    merge.page(WatchSnapshot(known=True, idle_at=WatchPosition(turn_id=b"l" * 16, step=2, ended=True), idle_number=4))
    shown = merge.live([begun(TURN, 5), text(0, "a"), final("a", number=5), begun(OTHER, 6)])
    assert kinds(shown) == ["state", "text", "ended", "state"]
    assert not merge.gap
    assert shown[2].position.ended


def test_a_session_that_missed_a_turn_asks_for_it() -> None:
    merge = WatchMerge(session=True)
    merge.page(WatchSnapshot(known=True, idle_at=WatchPosition(ended=True), idle_number=0))
    assert merge.live([begun(OTHER, 2)]) == []
    assert merge.gap
    shown = merge.page(page(text(0, "one"), final("one"), more=True))
    assert merge.gap
    assert merge.position.ended
    shown += merge.page(page(begun(OTHER, 2)))
    assert kinds(shown) == ["text", "ended", "state"]
    assert not merge.gap


def test_a_rejected_message_is_no_turn_of_the_session() -> None:
    merge = WatchMerge(session=True)
    merge.page(WatchSnapshot(known=True, idle_at=WatchPosition(ended=True), idle_number=0))
    merge.live([begun()])
    assert merge.live([ended(Outcome.OUTCOME_REJECTED, turn=OTHER, number=0), text(0, "a")])[0].event.text.text == "a"
    assert not merge.gap


def test_a_place_of_no_turn_is_said_to_be_unknown() -> None:
    merge = WatchMerge(session=True, after=WatchPosition(turn_id=OTHER, step=1))
    assert merge.page(WatchSnapshot(position_unknown=True)) == []
    assert merge.position_unknown
