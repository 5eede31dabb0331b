"""How sessions are spread over partitions and lanes: the same in every process, fixed for the life of a database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from soma_common.ids import PARTITION_FUNCTION
from soma_common.settings import StartRefused

BATCH_FORMAT: Final = 1
"""Format of the batches in the lanes that this release writes."""


class LaneMismatch(StartRefused):
    """Lanes or database were made for another layout: this process must not take part."""


@dataclass(frozen=True, slots=True)
class LaneLayout:
    """`partitions` units of ownership over `lanes` inbound streams."""

    partitions: int
    lanes: int

    def metadata(self) -> dict[str, str]:
        """What streams and database keep of the layout, to be compared by every process at start."""
        return {
            "soma_partitions": str(self.partitions),
            "soma_lanes": str(self.lanes),
            "soma_hash": PARTITION_FUNCTION,
        }
