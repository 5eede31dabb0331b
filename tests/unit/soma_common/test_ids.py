"""Ids are what their definition says, for a session that spoke before as for a new one."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import pytest

from soma_common import ids
from soma_common.layout import LaneLayout

KEY: Final = ("demo", "echo", "line", "raum-7")


def defined(kind: str, *parts: str | bytes) -> bytes:
    """The digest of the definition, written out again."""
    raw = [part.encode() if isinstance(part, str) else part for part in parts]
    framed = kind.encode() + b"".join(len(part).to_bytes(4, "big") + part for part in raw)
    return blake2b(framed, digest_size=16, person=b"somastack").digest()


@pytest.mark.parametrize("key", ["k", "ключ", "x" * 256])
def test_ids_follow_their_definition_at_every_look(key: str) -> None:
    for _ in range(2):
        session = ids.session_id(*KEY)
        assert session == defined("session", *KEY)
        message = ids.message_id(*KEY, key)
        assert message == session[:4] + defined("message", *KEY, key)[:12]
        turn = defined("turn", session, message, bytes(7) + b"\7")
        assert ids.turn_id(session, message, 7) == session[:4] + turn[:12]


@pytest.mark.parametrize("key", ["k", "ключ", "x" * 256])
def test_a_database_of_the_first_form_keeps_its_ids(key: str) -> None:
    """Those of release 0.1: a retry after an upgrade is the same message, and its turn has the same name."""
    session, message = ids.session_id(*KEY), ids.message_id(*KEY, key, ids.IDS_ANYWHERE)
    assert message == defined("message", *KEY, key)
    assert ids.turn_id(session, message) == defined("turn", session, message, bytes(8))


def test_parts_do_not_run_together() -> None:
    moved = ("demo", "ech", "oline", "raum-7")
    assert ids.session_id(*KEY) != ids.session_id(*moved)
    for form in (ids.IDS_ANYWHERE, ids.IDS_BESIDE):
        assert ids.message_id(*KEY, "ab", form) != ids.message_id("demo", "echo", "line", "raum-7a", "b", form)


def test_a_turn_and_its_replacements_differ() -> None:
    session = ids.session_id(*KEY)
    turns = {ids.turn_id(session, ids.message_id(*KEY, key), number) for key in "abc" for number in range(100)}
    assert len(turns) == 300
    assert {turn[:4] for turn in turns} == {session[:4]}


# ---- layouts


def test_what_is_kept_of_a_layout_is_found_again() -> None:
    for form in (ids.IDS_ANYWHERE, ids.IDS_BESIDE):
        kept = LaneLayout(8, 2, form).metadata()
        assert LaneLayout(8, 2).kept_as(kept) == LaneLayout(8, 2, form)
        assert LaneLayout(8, 2).message_id(*KEY, "k") == ids.message_id(*KEY, "k")
        assert LaneLayout(8, 2, form).message_id(*KEY, "k") == ids.message_id(*KEY, "k", form)


def test_the_first_form_is_kept_as_release_0_1_kept_it() -> None:
    """It compares all that is kept: with anything more it would refuse to work beside this release."""
    kept = {"soma_partitions": "8", "soma_lanes": "2", "soma_hash": "soma-partition-v1"}
    assert LaneLayout(8, 2, ids.IDS_ANYWHERE).metadata() == kept
    assert LaneLayout(8, 2, ids.IDS_BESIDE).metadata() != kept


@pytest.mark.parametrize(
    "change",
    [
        {"soma_partitions": "16"},
        {"soma_lanes": "1"},
        {"soma_hash": "other"},
        {"soma_ids": "soma-ids-v9"},
        {"soma_more": "1"},
    ],
)
def test_another_layout_is_not_taken(change: dict[str, str]) -> None:
    assert LaneLayout(8, 2).kept_as({**LaneLayout(8, 2).metadata(), **change}) is None


def test_nothing_kept_is_no_layout() -> None:
    assert LaneLayout(8, 2).kept_as({}) is None
