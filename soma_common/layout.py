"""How sessions are spread over partitions and lanes, and the form of their ids: the same in every process, fixed for
the life of a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from soma_common import ids
from soma_common.ids import IDS_ANYWHERE, IDS_BESIDE, PARTITION_FUNCTION
from soma_common.settings import StartRefused

BATCH_FORMAT: Final = 1
"""Format of the batches in the lanes that this release writes."""
_IDS: Final = "soma_ids"
_ID_FORMS: Final = (IDS_ANYWHERE, IDS_BESIDE)


class LaneMismatch(StartRefused):
    """Lanes or database were made for another layout: this process must not take part."""


@dataclass(frozen=True, slots=True)
class LaneLayout:
    """`partitions` units of ownership over `lanes` inbound streams, and the form of message ids (`soma_common.ids`)."""

    partitions: int
    lanes: int
    id_form: str = IDS_BESIDE

    def metadata(self) -> dict[str, str]:
        """What streams and database keep of the layout, to be compared by every process at start."""
        kept = {
            "soma_partitions": str(self.partitions),
            "soma_lanes": str(self.lanes),
            "soma_hash": PARTITION_FUNCTION,
        }
        # Releases that know one form only keep nothing of it. They refuse what has another.
        return kept if self.id_form == IDS_ANYWHERE else {**kept, _IDS: self.id_form}

    def kept_as(self, kept: Mapping[str, str]) -> LaneLayout | None:
        """This layout with the form of ids that streams or database were made with; None if they were made for another
        layout. No setting chooses the form: what is there has one, and what is new gets `IDS_BESIDE`.
        """
        form = kept.get(_IDS, IDS_ANYWHERE)
        layout = replace(self, id_form=form)
        return layout if form in _ID_FORMS and layout.metadata() == dict(kept) else None

    def message_id(self, tenant: str, agent: str, channel: str, session: str, idempotency_key: str) -> bytes:
        """The id of the message that `idempotency_key` names in its session."""
        return ids.message_id(tenant, agent, channel, session, idempotency_key, self.id_form)

    def lane_of(self, session_id: bytes) -> int:
        """The lane that carries a session."""
        return ids.lane_of(ids.partition_of(session_id, self.partitions), self.lanes)
