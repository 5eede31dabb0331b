"""Why a watch cannot go on, and what its caller does about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import WatchPosition

from soma_common.errors import FailedPrecondition, NotFound, ResourceExhausted, Unauthenticated
from soma_common.ids import SessionName, TurnName

BUSY_RETRY_S: Final = 1.0


def position_metadata(position: WatchPosition) -> dict[str, str]:
    """A position as metadata of an error."""
    return {
        "position_turn_id": position.turn_id.hex(),
        "position_dispatch": str(position.dispatch),
        "position_step": str(position.step),
        "position_offset": str(position.offset),
        "position_ended": str(position.ended).lower(),
    }


def position_of(metadata: Mapping[str, str]) -> WatchPosition | None:
    """The position that an error's metadata name, if they do."""
    try:
        return WatchPosition(
            turn_id=bytes.fromhex(metadata["position_turn_id"]),
            dispatch=int(metadata["position_dispatch"]),
            step=int(metadata["position_step"]),
            offset=int(metadata["position_offset"]),
            ended=metadata["position_ended"] == "true",
        )
    except (KeyError, ValueError):
        return None


def too_many(bound: str, value: int) -> ResourceExhausted:
    """The tenant has as many watches at this instance as it may."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"the tenant has {value} watches here already: end one, or try another instance",
        {"bound": bound, "value": str(value)},
        retry_delay_s=BUSY_RETRY_S,
    )


def too_slow(position: WatchPosition, events: int) -> ResourceExhausted:
    """A watcher has left `events` events, or as many bytes, unread; `position` is behind the last that it was given."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        "events are read too slowly: watch again from the position named here; nothing is lost",
        {"bound": "watch.buffer", "value": str(events), **position_metadata(position)},
        retry_delay_s=0.0,
    )


def unknown_position() -> FailedPrecondition:
    """The position to go on from is of no turn of the session."""
    return FailedPrecondition(
        ErrorReason.ERROR_REASON_WATCH_POSITION_UNKNOWN,
        "the position is of no turn of the session that is still kept: watch again without resume_from",
    )


def no_turn(session: SessionName, turn_id: bytes) -> NotFound:
    """The turn is not there."""
    return NotFound(
        ErrorReason.ERROR_REASON_TURN_NOT_FOUND,
        f"there is no turn {TurnName(session, turn_id)}; it exists once its message is stored",
    )


def expired() -> Unauthenticated:
    """The token that the watch was begun with is good no more."""
    return Unauthenticated(
        ErrorReason.ERROR_REASON_UNAUTHENTICATED, "the token of this watch has expired: watch again with a new one"
    )
