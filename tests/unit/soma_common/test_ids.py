"""Ids are what their definition says, for a session that spoke before as for a new one."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import pytest

from soma_common import ids

KEY: Final = ("demo", "echo", "line", "raum-7")


def defined(kind: str, *parts: str) -> bytes:
    """The definition, written out again."""
    framed = kind.encode() + b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
    return blake2b(framed, digest_size=16, person=b"somastack").digest()


@pytest.mark.parametrize("key", ["k", "ключ", "x" * 256])
def test_ids_follow_their_definition_at_every_look(key: str) -> None:
    for _ in range(2):
        assert ids.session_id(*KEY) == defined("session", *KEY)
        assert ids.message_id(*KEY, key) == defined("message", *KEY, key)


def test_parts_do_not_run_together() -> None:
    moved = ("demo", "ech", "oline", "raum-7")
    assert ids.session_id(*KEY) != ids.session_id(*moved)
    assert ids.message_id(*KEY, "ab") != ids.message_id("demo", "echo", "line", "raum-7a", "b")
