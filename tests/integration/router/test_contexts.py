"""What was said before, read for many sessions at once."""

from __future__ import annotations

import asyncio

import pytest
from soma.common.v1.message_pb2 import Message, Part, Role
from soma.common.v1.turn_pb2 import Delivery, FinalMessage, StepBody

from services.router.application.group import StoreLost
from services.router.application.outcomes import EndItem
from services.router.domain.partition import Partition
from services.router.domain.session import Session
from services.router.domain.turn import Outcome, StepKind
from tests.integration.router.store import Store, end, start
from tests.unit.router.builders import a_turn, inbound, ingest

TENANTS = ("mine", "theirs")


def answer(text: str) -> bytes:
    """The final step that says `text`."""
    said = Message(role=Role.ROLE_ASSISTANT, parts=[Part(text=text)])
    return StepBody(format=1, final=FinalMessage(message=said)).SerializeToString()


def question(text: str) -> bytes:
    return Message(role=Role.ROLE_USER, parts=[Part(text=text)]).SerializeToString()


def texts(said: list[bytes]) -> list[str]:
    return [Message.FromString(each).parts[0].text for each in said]


async def talk(store: Store, p: Partition, tenant: str, name: str, failing: frozenset[int], turns: int) -> Session:
    """A session of so many turns; those of `failing` ended without an answer."""
    session: Session | None = None
    for number in range(1, turns + 1):
        text = f"{tenant} {name} {number}"
        item = inbound(name, str(number), question(f"{text}?"), tenant=tenant)
        seq = p.mail_head + 1
        if session is None:
            session, turn = await store.started(p, item, seq, tenant)
        else:
            mail = ingest(p, seq, item, tenant=tenant)
            turn = a_turn(session, mail.entries[0].message)
            turn.number = number
            await store.commit(mail, start(turn))
        if number in failing:
            failure = StepBody(format=1).SerializeToString()
            ending = EndItem(p, turn, Outcome.ERROR, [(StepKind.FAILURE, failure)], Delivery(), lambda *_: None)
        else:
            ending = end(turn, body=answer(f"{text}!"))
        await store.commit(ending)
        session.turn_count = number
    assert session is not None
    return session


async def test_everybody_who_asks_at_once_is_told_his_own(store: Store) -> None:
    p = await store.take(0)
    talks = {
        (tenant, name): await talk(store, p, tenant, name, frozenset({2}), 4) for tenant in TENANTS for name in "ab"
    }
    asked = [*talks, *talks]
    told = await asyncio.gather(*(store.history.context(t, talks[t, name].id, 5) for t, name in asked))
    for (tenant, name), said in zip(asked, told, strict=True):
        of = f"{tenant} {name}"
        assert texts(said) == [f"{of} 2?", f"{of} 3?", f"{of} 3!", f"{of} 4?", f"{of} 4!"]
    # Also while the other tenant's rows are let through for somebody else.
    mine, theirs = talks["mine", "a"].id, talks["theirs", "a"].id
    [own, foreign] = await asyncio.gather(
        store.history.context("mine", mine, 1), store.history.context("mine", theirs, 1)
    )
    both = await asyncio.gather(store.history.context("theirs", theirs, 1), store.history.context("mine", theirs, 1))
    assert (texts(own), foreign) == (["mine a 4!"], [])
    assert (texts(both[0]), both[1]) == (["theirs a 4!"], [])


@pytest.mark.parametrize("limit", range(1, 9))
async def test_turns_without_an_answer_do_not_make_it_shorter(store: Store, limit: int) -> None:
    p = await store.take(0)
    session = await talk(store, p, "mine", "s", frozenset({2, 3, 4}), 5)
    every = ["1?", "1!", "2?", "3?", "4?", "5?", "5!"]
    said = await store.history.context("mine", session.id, limit)
    assert texts(said) == [f"mine s {text}" for text in every[-limit:]]


async def test_a_lost_store_is_told_to_all_who_wait(store: Store) -> None:
    p = await store.take(0)
    session = await talk(store, p, "mine", "s", frozenset(), 1)
    await store.history.close()
    asked = (store.history.context("mine", session.id, 2) for _ in range(5))
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in told] == [StoreLost] * 5
