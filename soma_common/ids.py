"""Derived identifiers and resource names.

Every id that two processes must agree on is a BLAKE2b digest over length-prefixed parts, so that ("a", "bc") and
("ab", "c") never meet (RFC 7693; the prefix is the part's length in 4 bytes, big endian). A retry therefore has the
same message id wherever it arrives, and a session has the same partition in every process and release:
`PARTITION_FUNCTION` names that function, and processes that are configured with another one refuse to work together.

Ids of what is in a session begin like the session's own id (`IDS_BESIDE`), so that in an index what belongs together
stands together: what a turn writes touches pages that its session has touched before, however many turns there are.
Databases that were made before that keep digests that stand anywhere (`IDS_ANYWHERE`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final

ID_BYTES: Final = 16
PARTITION_FUNCTION: Final = "soma-partition-v1"
PLACE_BYTES: Final = 4
"""Of the session's id, in front of 12 bytes of digest: enough to tell some billion sessions apart by their place. That
ids differ is the digest's doing: 96 bits of it within a session.
"""
IDS_ANYWHERE: Final = "soma-ids-v1"
"""The form of message ids that are digests as a whole."""
IDS_BESIDE: Final = "soma-ids-v2"
"""The form of message ids that begin like their session's."""
KNOWN_SESSIONS: Final = 4096
"""Session keys whose digests are kept, about 3 MB at most: nearly every message is of a session that spoke lately."""

_SLUG = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_SESSION = r"[A-Za-z0-9._~:@+=-]{1,128}"
_SLUG_RE: Final = re.compile(_SLUG)
_SESSION_RE: Final = re.compile(_SESSION)
_NAME_RE: Final = re.compile(
    rf"tenants/({_SLUG})/agents/({_SLUG})/channels/({_SLUG})/sessions/({_SESSION})(?:/turns/([0-9a-f]{{32}}))?"
)


class InvalidName(ValueError):
    """A resource name does not have the form its kind asks for."""


def _begun(kind: bytes, *parts: bytes) -> blake2b:
    """A digest that goes on after `parts`."""
    return blake2b(kind + b"".join([_prefixed(part) for part in parts]), digest_size=ID_BYTES, person=b"somastack")


def _prefixed(part: bytes) -> bytes:
    return len(part).to_bytes(4, "big") + part


def _digest(kind: bytes, *parts: bytes) -> bytes:
    return _begun(kind, *parts).digest()


@lru_cache(KNOWN_SESSIONS)
def session_id(tenant: str, agent: str, channel: str, session: str) -> bytes:
    """The 16-byte id of a session key."""
    return _digest(b"session", tenant.encode(), agent.encode(), channel.encode(), session.encode())


def message_id(
    tenant: str, agent: str, channel: str, session: str, idempotency_key: str, form: str = IDS_BESIDE
) -> bytes:
    """The 16-byte id of the message that `idempotency_key` names in its session.

    `form` is fixed for the life of a database (`soma_common.layout`): in another form a retry would be another message.
    """
    place, begun = _messages_of(tenant, agent, channel, session)
    digest = begun.copy()
    digest.update(_prefixed(idempotency_key.encode()))
    return place + digest.digest()[:-PLACE_BYTES] if form == IDS_BESIDE else digest.digest()


@lru_cache(KNOWN_SESSIONS)
def _messages_of(tenant: str, agent: str, channel: str, session: str) -> tuple[bytes, blake2b]:
    """Where a session's ids stand, and what its messages' digests have in common; to be copied."""
    parts = tenant.encode(), agent.encode(), channel.encode(), session.encode()
    return session_id(tenant, agent, channel, session)[:PLACE_BYTES], _begun(b"message", *parts)


def turn_id(session: bytes, message: bytes, generation: int = 0) -> bytes:
    """The 16-byte id of the turn whose first input is `message`. It stands beside its session's if the message's does:
    so whoever knows both ids derives the same, whatever form the database has.

    `generation` counts replacements: crash recovery keeps the id, a turn that is started anew after a rollback gets
    the next generation, so that its steps never meet results stored under the keys of the dropped one.
    """
    digest = _digest(b"turn", session, message, generation.to_bytes(8, "big"))
    place = session[:PLACE_BYTES]
    return place + digest[:-PLACE_BYTES] if message.startswith(place) else digest


def content_hash(content: bytes) -> bytes:
    """BLAKE2b-128 of a message's content: tells a retry from a key that is used again for something else."""
    return blake2b(content, digest_size=ID_BYTES).digest()


def partition_of(session: bytes, partitions: int) -> int:
    """The partition of a session id: its first 8 bytes, big endian, modulo the number of partitions
    (`PARTITION_FUNCTION`).
    """
    return int.from_bytes(session[:8], "big") % partitions


def lane_of(partition: int, lanes: int) -> int:
    """The inbound lane that carries a partition."""
    return partition % lanes


def call_key(turn: bytes, step: int, index: int) -> str:
    """The idempotency key of a tool call: `<turn in hex>/<step>/<index of the call in its step>`."""
    return f"{turn.hex()}/{step}/{index}"


def is_slug(value: str) -> bool:
    """Whether `value` can name a tenant, an agent or a channel: 1 to 63 of a-z, 0-9 and inner hyphens."""
    return _SLUG_RE.fullmatch(value) is not None


def is_session(value: str) -> bool:
    """Whether `value` can name a conversation: 1 to 128 letters, digits and `._~:@+=-`."""
    return _SESSION_RE.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class SessionName:
    """`tenants/{tenant}/agents/{agent}/channels/{channel}/sessions/{session}`."""

    tenant: str
    agent: str
    channel: str
    session: str

    @classmethod
    def parse(cls, name: str) -> SessionName:
        """Reads a session's resource name. Raises InvalidName."""
        match = _NAME_RE.fullmatch(name)
        if match is None or match[5]:
            raise InvalidName(f"{name!r} is not tenants/{{t}}/agents/{{a}}/channels/{{c}}/sessions/{{s}}")
        return cls(match[1], match[2], match[3], match[4])

    @property
    def id(self) -> bytes:
        """The derived session id."""
        return session_id(self.tenant, self.agent, self.channel, self.session)

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/agents/{self.agent}/channels/{self.channel}/sessions/{self.session}"


@dataclass(frozen=True, slots=True)
class TurnName:
    """A session's name followed by `/turns/{turn id as 32 hex digits}`."""

    session: SessionName
    turn_id: bytes

    @classmethod
    def parse(cls, name: str) -> TurnName:
        """Reads a turn's resource name. Raises InvalidName."""
        match = _NAME_RE.fullmatch(name)
        if match is None or not match[5]:
            raise InvalidName(
                f"{name!r} is not tenants/{{t}}/agents/{{a}}/channels/{{c}}/sessions/{{s}}/turns/{{turn}}"
            )
        return cls(SessionName(match[1], match[2], match[3], match[4]), bytes.fromhex(match[5]))

    def __str__(self) -> str:
        return f"{self.session}/turns/{self.turn_id.hex()}"
