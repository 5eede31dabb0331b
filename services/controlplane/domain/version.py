"""Etags and revisions: how a resource says which state of it somebody has seen.

The *version* is the number of the configuration change that last wrote the resource: dense, never given twice, so a
resource that was deleted and made again has another etag. The *revision* names content alone: the same spec has the
same revision in whichever agent, today and in a year.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import blake2b
from typing import Final, NamedTuple

from soma.controlplane.v1.agent_service_pb2 import AgentSpec

from services.controlplane.domain.refusals import etag_mismatch

DIGEST_BYTES: Final = 8
"""Etags and revisions are 16 hex digits: they tell states apart, they guard nothing against forgery."""


class Stamp(NamedTuple):
    """Which change of the configuration this is, and when."""

    version: int
    time: datetime
    """The database's clock, UTC."""


def etag_of(name: str, version: int) -> str:
    """The etag of resource `name` as the change `version` left it."""
    return blake2b(f"{name}@{version}".encode(), digest_size=DIGEST_BYTES, person=b"soma-etag").hexdigest()


def check_etag(name: str, sent: str, stored: str) -> None:
    """Refuse a change whose sender has seen another state; an empty `sent` asks for no such check.

    Raises:
        Conflict: ETAG_MISMATCH.
    """
    if sent and sent != stored:
        raise etag_mismatch(name, sent, stored)


def revision_of(spec: AgentSpec) -> str:
    """The name of the spec's content: a digest of its deterministic serialization.

    Fields this release does not know are part of the content: a newer client's spec is another spec. AgentSpec has no
    map fields, so its serialization is the same in every process of a release.
    """
    content = spec.SerializeToString(deterministic=True)
    return blake2b(content, digest_size=DIGEST_BYTES, person=b"soma-revision").hexdigest()
