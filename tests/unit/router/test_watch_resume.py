"""Whatever is lost, late or cut off, and wherever a watch is resumed: what is shown is what the journals hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from soma.common.v1.turn_pb2 import WatchPosition
from soma.router.v1.outbound_pb2 import WatchQuery

from tests.unit.router.builders import TENANT
from tests.unit.router.watch_world import Client, World, run

words = st.text(alphabet="abcdé🎈", min_size=1, max_size=120)
moves = st.lists(
    st.one_of(
        words.map(lambda text: ("say", text)),
        st.integers(1, 4).map(lambda count: ("call", count)),
        st.sampled_from(
            [("interim", None), ("crash", None), ("new_owner", None)]
            + [(end, None) for end in ("answer", "fail", "cancel", "interrupt", "roll_back")]
        ),
    ),
    max_size=25,
)
ENDS = ("answer", "fail", "cancel", "interrupt", "roll_back")


def apply(world: World, name: str, argument: object) -> None:
    """One move; a turn begins by itself where one is needed."""
    if world.turn is None:
        world.begin()
    getattr(world, name)(*([] if argument is None else [argument]))


@settings(max_examples=100, deadline=None)
@given(moves, st.data())
def test_a_session_is_shown_as_it_is_journaled(steps: list[tuple[str, object]], data: st.DataObject) -> None:
    world = World()
    world.session.remember([], 0)
    client = Client(world)
    client.position = WatchPosition(ended=True)  # from the session's first turn
    client.reconnect()
    late = None
    for name, argument in [*steps, ("answer", None)]:
        apply(world, name, argument)
        heard = world.outbox.take()
        match data.draw(
            st.sampled_from(["heard", "heard", "heard", "lost", "twice", "cut", "holed", "away"]), label="fate"
        ):
            case "heard":
                client.hear(heard)
            case "twice":
                client.hear(heard)
                client.hear(heard)
            case "cut":
                client.hear(heard[: data.draw(st.integers(0, len(heard)), label="cut at")])
            case "holed":
                hole = data.draw(st.integers(0, max(len(heard) - 1, 0)), label="hole at")
                client.hear(heard[:hole] + heard[hole + 1 :])
            case "away":
                client.reconnect()
        if late is not None:
            client.read(late)
            late = None
        asks = client.merge.gap or data.draw(st.booleans(), label="renews")
        if asks and data.draw(st.booleans(), label="answered late"):
            late = client.ask()
        elif asks:
            client.read(client.ask())
    client.catch_up()
    assert client.ended == list(world.store.turns)
    assert client.shown == world.truth()


@settings(max_examples=60, deadline=None)
@given(moves, st.integers(0, 400), st.integers(0, 30))
def test_two_watchers_see_the_same_wherever_one_was_cut_off(
    steps: list[tuple[str, object]], cut_at: int, away: int
) -> None:
    """One never leaves. The other sees a first part of it, one event more each time, and comes back later."""
    world = World()
    first = Client(world)
    first.position = WatchPosition(ended=True)
    first.reconnect()
    first.catch_up()
    other = Client(world)
    other.position = WatchPosition(ended=True)
    other.reconnect()
    other.catch_up()
    count = 0
    for name, argument in [*steps, ("answer", None)]:
        apply(world, name, argument)
        for event in world.outbox.take():
            first.hear([event])
            if first.merge.gap:
                first.catch_up()
            count += 1
            if count <= cut_at or count > cut_at + away:
                other.hear([event])
                if other.merge.gap:
                    other.catch_up()
            if count == cut_at:
                other.reconnect()
    first.catch_up()
    other.catch_up()
    assert first.shown == other.shown == world.truth()
    assert first.ended == other.ended


@settings(max_examples=100, deadline=None)
@given(moves)
def test_a_watch_of_an_ended_turn_is_its_journal_page_by_page(steps: list[tuple[str, object]]) -> None:
    world = World()
    for name, argument in [*steps, ("answer", None)]:
        apply(world, name, argument)
    for turn_id, content in world.truth().items():
        client = Client(world, turn_id)
        client.catch_up()
        assert client.done
        assert client.taken_back == 0
        assert client.shown == {turn_id: content}


def test_nothing_is_taken_back_where_nothing_was_given_up() -> None:
    world = World()
    client = Client(world)
    for name, argument in [("say", "a"), ("call", 2), ("say", "b"), ("interim", None), ("say", "c"), ("answer", None)]:
        apply(world, name, argument)
        client.hear(world.outbox.take())
        client.reconnect()
        client.catch_up()
    assert client.taken_back == 0
    assert client.shown == world.truth()


def test_a_crash_takes_back_what_was_shown_of_the_running_step_and_no_more() -> None:
    world = World()
    world.begin()
    client = Client(world)
    client.catch_up()
    for name, argument in [("say", "a"), ("call", 1), ("say", "b")]:
        apply(world, name, argument)
        client.hear(world.outbox.take())
    away = Client(world)
    away.position = client.position
    apply(world, "crash", None)
    apply(world, "say", "c")
    client.hear(world.outbox.take())
    assert client.taken_back == 1
    away.shown = {turn: dict(steps) for turn, steps in client.shown.items()}
    away.shown[next(iter(away.shown))][3] = ("b", 0)
    away.reconnect()
    away.catch_up()
    assert away.taken_back == 1
    assert away.shown == client.shown


def test_a_session_watched_without_a_position_begins_with_the_running_turn() -> None:
    world = World()
    apply(world, "say", "old")
    apply(world, "answer", None)
    apply(world, "say", "new")
    client = Client(world)
    client.catch_up()
    assert [list(steps.values()) for steps in client.shown.values()] == [[("new", 0)]]


def test_a_resting_session_is_resumed_behind_its_last_turn() -> None:
    world = World()
    apply(world, "say", "old")
    apply(world, "answer", None)
    client = Client(world)
    client.catch_up()
    assert client.shown == {}
    assert client.position is not None
    assert client.position.ended
    for said in ("one", "two"):
        apply(world, "say", said)
        apply(world, "answer", None)
    client.reconnect()
    client.catch_up()
    assert [list(steps.values()) for steps in client.shown.values()] == [[("one", 0)], [("two", 0)]]


def test_a_position_of_no_turn_is_unknown() -> None:
    world = World()
    after = WatchPosition(turn_id=b"x" * 16, step=1)
    query = WatchQuery(session_id=world.session.id, after=after, session=True, resumed=True)
    page = run(world.desk.query(TENANT, world.session.partition.id, query))
    assert page is not None
    assert page.position_unknown


def test_where_a_session_rests_is_read_from_the_store_once() -> None:
    world = World()
    apply(world, "answer", None)
    other = World()  # another owner, who has seen no turn of the session
    other.store.turns.update(world.store.turns)
    other.session.turn_count = other.messages = 1
    client = Client(other)
    client.catch_up()
    reads = other.store.reads
    assert reads
    for _ in range(3):
        client.read(client.ask())
    assert other.store.reads == reads
    apply(other, "say", "next")
    client.hear(other.outbox.take())
    assert list(client.shown.values()) == [{1: ("next", 0)}]
