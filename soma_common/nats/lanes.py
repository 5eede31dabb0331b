"""The inbound lanes: the JetStream streams that carry accepted messages to the routers.

A lane is read whole by every router that owns one of its partitions; subjects are few (one per tenant) because
filtered consumers over many subjects collapse. Its bound is per subject, so per tenant: a tenant that is not drained
fills its own share and is refused, and nobody else is. It has no age limit: what was acknowledged leaves only when
every partition has it in PostgreSQL.
"""

from __future__ import annotations

from typing import Final

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo
from nats.js.errors import BadRequestError, NotFoundError
from soma.common.v1.error_reason_pb2 import ErrorReason

from soma_common.errors import Unavailable
from soma_common.layout import LaneLayout, LaneMismatch

DEDUPE_WINDOW_S: Final = 120.0
_NAME_IN_USE: Final = 10058


def stream_name(lane: int) -> str:
    """The JetStream stream of a lane."""
    return f"SOMA_IN_{lane}"


def lane_config(lane: int, layout: LaneLayout, tenant_bound: int, replicas: int = 1) -> StreamConfig:
    """The stream of a lane. `tenant_bound` is the most batches one tenant may have in it."""
    return StreamConfig(
        name=stream_name(lane),
        subjects=[f"soma.*.in.{lane}"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        discard_new_per_subject=True,
        max_msgs_per_subject=tenant_bound,
        duplicate_window=DEDUPE_WINDOW_S,
        num_replicas=replicas,
        metadata=layout.metadata(),
    )


async def find_layout(js: JetStreamContext, layout: LaneLayout) -> LaneLayout:
    """`layout` with the form of ids that the lanes were made with.

    For those who cannot ask the database: the first lanes are made by a router, which can.

    Raises:
        Unavailable: there is no lane yet.
        LaneMismatch: they were made for another layout.
    """
    for lane in range(layout.lanes):
        try:
            info = await js.stream_info(stream_name(lane))
        except NotFoundError:
            continue
        found = layout.kept_as(_metadata(info))
        if found is None:
            raise _mismatch(info, layout)
        return found
    raise Unavailable(
        ErrorReason.ERROR_REASON_BUS_UNAVAILABLE, "there are no lanes yet: a router makes them when it starts"
    )


async def ensure_lanes(js: JetStreamContext, layout: LaneLayout, tenant_bound: int, replicas: int = 1) -> None:
    """Makes the lanes that are missing and checks those that exist. Raises LaneMismatch when they were made for
    another layout.
    """
    for lane in range(layout.lanes):
        try:
            info = await js.stream_info(stream_name(lane))
        except NotFoundError:
            try:
                info = await js.add_stream(lane_config(lane, layout, tenant_bound, replicas))
            except BadRequestError as error:
                if error.err_code != _NAME_IN_USE:
                    raise
                info = await js.stream_info(stream_name(lane))  # another process was first, perhaps with other bounds
        if _metadata(info) != layout.metadata():
            raise _mismatch(info, layout)


def _metadata(info: StreamInfo) -> dict[str, str]:
    """What a lane keeps of its layout. The server adds keys of its own."""
    return {key: value for key, value in (info.config.metadata or {}).items() if key.startswith("soma_")}


def _mismatch(info: StreamInfo, layout: LaneLayout) -> LaneMismatch:
    return LaneMismatch(
        f"stream {info.config.name} was made for {_metadata(info)}, this process is set to {layout.metadata()}: "
        "set SOMA_PARTITIONS and SOMA_LANES to the stream's values; a change needs a stop, a drain and new streams; "
        "no setting changes soma_ids: lanes and database belong to one system, bring back those that do"
    )
