"""Every NATS subject of the platform. docs/subjects.md says for each who publishes, who reads and what happens to it.

The tenant is the second token of every subject, so that permissions, bounds and captures can be cut by tenant.
"""

from __future__ import annotations


def inbound(tenant: str, lane: int) -> str:
    """JetStream: accepted messages of a tenant, as InBatch (gateway -> routers)."""
    return f"soma.{tenant}.in.{lane}"


def outbound(tenant: str, gateway: str) -> str:
    """Core: deliveries and live events for the adapters at one gateway, as OutBatch (router -> gateway)."""
    return f"soma.{tenant}.out.{gateway}"


def acks(tenant: str, router: str) -> str:
    """Core: what became of deliveries, as AckBatch (gateway -> router)."""
    return f"soma.{tenant}.ack.{router}"


def presence(tenant: str, gateway: str) -> str:
    """Core: the adapter streams of a tenant at one gateway, as Presence (gateway -> routers)."""
    return f"soma.{tenant}.presence.{gateway}"


def live(tenant: str, session_id: bytes) -> str:
    """Core: what the running turn of a session does, as LiveBatch, while somebody watches (router -> watchers)."""
    return f"soma.{tenant}.live.{session_id.hex()}"


def watch(tenant: str, partition: int) -> str:
    """Core request: WatchQuery to the owner of a partition, answered by a WatchSnapshot (watcher -> router)."""
    return f"soma.{tenant}.watch.{partition}"


def load(tenant: str, router: str) -> str:
    """Core: what waits for a tenant in one router's mailboxes, as MailboxLoad (router -> gateways)."""
    return f"soma.{tenant}.load.{router}"


def progress(lane: int | str) -> str:
    """Core: how far a router has taken a lane in, as LaneProgress (router -> gateways). `_` is no tenant: the news is
    about all of them.
    """
    return f"soma._.progress.{lane}"


def tenant_of(subject: str) -> str:
    """The tenant of any subject above."""
    return subject.split(".", 2)[1]
