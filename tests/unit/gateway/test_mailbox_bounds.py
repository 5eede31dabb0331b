"""Who is refused by what the routers tell, and who is not."""

from __future__ import annotations

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.router.v1.outbound_pb2 import MailboxLoad

from services.gateway.domain.mailbox_bounds import EXPIRES_S, MailboxBounds
from services.gateway.domain.refusal import Refused

FULL, FREE = b"full" * 4, b"free" * 4


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.bounds = MailboxBounds(per_tenant=100, per_session=10, clock=lambda: self.now)

    def hears(self, *partitions: tuple[int, int, int], full: bytes = b"", tenant: str = "demo") -> None:
        """(partition, epoch, waiting); the full session is in the first partition."""
        load = MailboxLoad(router="router-0")
        for partition, epoch, waiting in partitions:
            load.partitions.add(partition=partition, epoch=epoch, waiting=waiting)
        if full:
            load.partitions[0].full_sessions.append(full)
        self.bounds.on_load(tenant, load)

    def bound(self, session: bytes = FREE, tenant: str = "demo") -> str:
        """Name of the bound that refuses a message; empty if it is let in."""
        try:
            self.bounds.check_session(tenant, session)
            self.bounds.check_tenant(tenant)
        except Refused as refused:
            error = refused.error
        else:
            return ""
        assert error.reason == ErrorReason.ERROR_REASON_QUEUE_FULL
        assert error.retry_delay_ms
        return error.metadata["bound"]


def test_a_tenant_is_refused_at_its_bound_over_all_partitions_and_nobody_else_is() -> None:
    world = World()
    assert not world.bound()
    world.hears((0, 1, 60))
    world.hears((1, 1, 39))
    assert not world.bound()
    world.hears((1, 1, 40))
    assert world.bound() == "tenant.queued_messages"
    assert not world.bound(tenant="acme")
    world.hears((0, 1, 59))
    assert not world.bound()


def test_a_session_at_its_bound_is_refused_and_others_are_not() -> None:
    world = World()
    world.hears((0, 1, 10), full=FULL)
    assert world.bound(FULL) == "session.queued_messages"
    assert not world.bound(FREE)
    assert not world.bound(FULL, tenant="acme")
    world.hears((0, 1, 9))
    assert not world.bound(FULL)


def test_the_metadata_names_the_bound_and_its_value() -> None:
    world = World()
    world.hears((0, 1, 100))
    with pytest.raises(Refused) as refused:
        world.bounds.check_tenant("demo")
    assert dict(refused.value.error.metadata) == {"bound": "tenant.queued_messages", "value": "100"}


def test_a_new_owner_replaces_what_the_old_one_said() -> None:
    world = World()
    world.hears((0, 1, 80), full=FULL)
    world.hears((0, 2, 80), (1, 1, 15))
    assert not world.bound(), "80 and 15, not 80 and 80 and 15"
    assert not world.bound(FULL)
    world.hears((0, 1, 100))
    assert not world.bound(), "an owner of the past is not heard"


def test_what_nobody_confirms_runs_out_but_not_before_a_new_owner_would_have_spoken() -> None:
    world = World()
    world.hears((0, 1, 100), full=FULL)
    world.now += EXPIRES_S - 1
    world.hears((1, 1, 0))
    assert world.bound() == "tenant.queued_messages"
    assert world.bound(FULL) == "session.queued_messages"
    world.now += 2
    assert not world.bound()
    assert not world.bound(FULL)
