"""The inbound lanes on JetStream: one batch is one message, stored and synced before the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Final

import nats.errors
import structlog
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import Header
from nats.js.errors import APIError
from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.gateway.application.ports import BatchUnacceptable, BusSilent, LaneFull
from soma_common.layout import BATCH_FORMAT, LaneLayout
from soma_common.nats import subjects
from soma_common.nats.lanes import ensure_lanes
from soma_common.nats.requests import Requests
from soma_common.telemetry import spans

BOUND_REACHED: Final = 10077
"""JetStream's code of every bound of a stream; the description says which."""
TOO_LARGE: Final = 10054
MAKE_TIMEOUT_S: Final = 2.0

_log = structlog.get_logger(__name__)


class NatsLanes:
    """Port `Lanes`. Makes the lanes when they are missing, as after their server lost its disk."""

    def __init__(self, nc: Client, layout: LaneLayout, tenant_bound: int) -> None:
        """`tenant_bound`: batches of one tenant in one lane, for lanes that are made here."""
        self._nc = nc
        self._js: JetStreamContext = nc.jetstream()
        self._requests = Requests(nc)
        self._layout = layout
        self._tenant_bound = tenant_bound

    async def ensure(self) -> None:
        """Makes what is missing and compares the rest. Raises LaneMismatch, or nats errors when the bus does not
        answer.
        """
        await ensure_lanes(self._js, self._layout, self._tenant_bound)

    async def store(self, tenant: str, lane: int, batch_id: str, items: Sequence[Inbound], timeout_s: float) -> int:
        """Returns the batch's sequence in its stream when it is on disk. The server knows the batch id for two minutes:
        a batch sent twice is stored once.

        Raises:
            BusSilent, LaneFull, BatchUnacceptable: as the port says.
        """
        if not self._nc.is_connected:
            # The client would keep it and send it whenever it is back, long after we have given up.
            raise BusSilent
        payload = InBatch(format=BATCH_FORMAT, tenant=tenant, items=items).SerializeToString()
        if spans.watched:
            spans.stage("gateway.gather", (item.message_id for item in items))
        try:
            answer = await self._requests.request(
                subjects.inbound(tenant, lane), payload, timeout_s, {Header.MSG_ID: batch_id}
            )
            place = _place(answer.data)
            if spans.watched:
                spans.stage("gateway.store", (item.message_id for item in items))
            return place
        except nats.errors.NoRespondersError:
            await self._make_lanes()
            raise BusSilent from None
        except APIError as error:
            raise _translated(error, self._tenant_bound) from error
        except nats.errors.MaxPayloadError as error:
            raise BatchUnacceptable(f"{len(payload)} bytes are more than its largest payload") from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise BusSilent from error

    async def _make_lanes(self) -> None:
        """Nobody stores this subject: either JetStream is not up yet, or the lane is gone."""
        try:
            async with asyncio.timeout(MAKE_TIMEOUT_S):
                await self.ensure()
        except (nats.errors.Error, APIError, OSError, TimeoutError) as error:
            _log.warning("lanes.unavailable", error=repr(error))


def _place(answer: bytes) -> int:
    """The sequence that JetStream's answer to a publish names. Raises APIError when it names an error instead."""
    said = json.loads(answer)
    if "error" in said:
        raise APIError.from_error(said["error"])
    return int(said["seq"])


def _translated(error: APIError, tenant_bound: int) -> Exception:
    description = error.description or ""
    if error.err_code == BOUND_REACHED:
        if "per subject" in description:
            return LaneFull("lane.tenant_batches", tenant_bound)
        return LaneFull("lane.bytes" if "bytes" in description else "lane.batches", 0)
    if error.err_code == TOO_LARGE:
        return BatchUnacceptable(description)
    _log.warning("lanes.refused", code=error.code, err_code=error.err_code, description=description)
    return BusSilent(description)
