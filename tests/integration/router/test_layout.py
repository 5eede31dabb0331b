"""Database and lanes have one layout, whichever was there first; the form of ids is that of what is there."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from nats.js import JetStreamContext

from services.router.main import agreed_layout
from soma_common.ids import IDS_ANYWHERE
from soma_common.layout import LaneLayout, LaneMismatch
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import ensure_lanes
from soma_common.testing.embedded import FaultyNats
from tests.integration.router.store import LAYOUT, Store

OLDER = LaneLayout(LAYOUT.partitions, LAYOUT.lanes, IDS_ANYWHERE)


@pytest.fixture
async def js(nats_server: FaultyNats) -> AsyncIterator[JetStreamContext]:
    client = await connect_nats(nats_server.url, nats_server.token_file, "test")
    yield client.jetstream()
    await client.close()


async def _make(store: Store, layout: LaneLayout | None) -> None:
    """A database that was made with a layout; None: a new one."""
    await store.eye.execute("DELETE FROM router.layout")
    if layout is not None:
        await store.leases.ensure_layout(layout)


@pytest.mark.parametrize("lanes", [None, OLDER, LAYOUT])
async def test_a_new_database_takes_over_the_form_of_the_lanes(
    store: Store, js: JetStreamContext, lanes: LaneLayout | None
) -> None:
    """It takes in what they hold: in another form, a retry of that would be another message."""
    await _make(store, None)
    if lanes is not None:
        await ensure_lanes(js, lanes, 100)
    agreed = await agreed_layout(js, store.leases, LAYOUT)
    assert agreed == (lanes or LAYOUT)
    await ensure_lanes(js, agreed, 100)
    assert await agreed_layout(js, store.leases, LAYOUT) == agreed, "and keeps it"


@pytest.mark.parametrize("made", [OLDER, LAYOUT])
async def test_lanes_that_are_lost_are_made_with_the_form_of_the_database(
    store: Store, js: JetStreamContext, made: LaneLayout
) -> None:
    await _make(store, made)
    assert await agreed_layout(js, store.leases, LAYOUT) == made


async def test_a_database_and_lanes_of_different_forms_are_not_served(store: Store, js: JetStreamContext) -> None:
    await _make(store, LAYOUT)
    await ensure_lanes(js, OLDER, 100)
    agreed = await agreed_layout(js, store.leases, LAYOUT)
    with pytest.raises(LaneMismatch):
        await ensure_lanes(js, agreed, 100)


async def test_another_number_of_partitions_is_refused_by_either(store: Store, js: JetStreamContext) -> None:
    more = LaneLayout(LAYOUT.partitions * 2, LAYOUT.lanes)
    with pytest.raises(LaneMismatch, match="the database was made for"):
        await agreed_layout(js, store.leases, more)
    await ensure_lanes(js, LAYOUT, 100)
    with pytest.raises(LaneMismatch, match="SOMA_PARTITIONS"):
        await agreed_layout(js, store.leases, more)
