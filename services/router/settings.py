"""Settings of the router."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from soma_common.settings import ServiceSettings


class RouterSettings(ServiceSettings):
    """What a router needs to know beside the shared settings; the first five are shared ones without which it cannot
    run.
    """

    postgres_dsn: str
    controlplane_target: str
    toolgw_target: str
    auth_keys_file: Path
    auth_service_token_file: Path

    tenant_lane_batches: int = Field(default=100_000, ge=100)
    """Most batches a tenant may have in one inbound lane: the bound on what is accepted while PostgreSQL is down. Used
    when this router is the one that makes the lanes."""
    max_running_turns: int = Field(default=4096, ge=1)
    """Most turns this router runs at once."""
    max_queued_per_session: int = Field(default=1000, ge=1)
    """Messages of a session that may wait for their turn; over it the gateways refuse further ones with QUEUE_FULL."""
    max_queued_per_tenant: int = Field(default=100_000, ge=1)
    """Messages of a tenant that may wait for their turn, the gateways' setting: tells from how many on a tenant is
    spoken of."""
    max_idle_sessions: int = Field(default=1024, ge=0)
    """Idle sessions kept in memory, so that their next message costs one transaction less."""
    tenant_watches: int = Field(default=1024, ge=1)
    """Most watches (WatchTurn, WatchSession) of one tenant at this router; over it a new one is refused with
    QUEUE_FULL."""
    tenant_reads: int = Field(default=256, ge=1)
    """Most reads of one tenant that wait at this router for a connection to the database, those of the API and those of
    watches each; over it one is refused with QUEUE_FULL."""
    max_strikes: int = Field(default=5, ge=3)
    """How often a turn's brain or router may die before the turn is set aside as a dead letter. From the second death
    on it runs while no other such turn does."""
    stuck_margin_s: float = Field(default=5.0, gt=0)
    """A turn of which nothing is heard for its agent's step timeout and so long is restarted."""
    start_ahead: bool = True
    """Whether brains are given turns while their start is on its way to the store, which saves a tenth of a short turn.
    Nothing they say counts before the start is durable; a model may be called once in vain if it never is."""
    convergence_timeout_s: float = Field(default=60.0, gt=0)
    """How long a stopped turn waits for its tool calls in flight before it ends with their outcome not known."""
    ack_wait_s: float = Field(default=30.0, gt=0)
    """How long an adapter may keep a delivery unacknowledged before it is sent again."""
    delivery_tries: int = Field(default=10, ge=1)
    """Tries of a delivery before it becomes a dead letter."""
    delivery_retry_s: float = Field(default=1.0, gt=0)
    """Wait before a returned delivery is tried again, unless the adapter says otherwise."""
    lane_backlog: int = Field(default=512, ge=16)
    """Most lane messages that are read and not committed."""
    purge_every_s: float = Field(default=5.0, gt=0)
    """How often lanes are purged of what all partitions have."""
    lane_purge_lag_s: float = Field(default=600.0, ge=0)
    """A lane message is purged once all partitions have had it for so long, and every connected standby has it on disk:
    a database restored to a copy no older than this loses no accepted message. Shorter where it would keep more than
    half of `SOMA_TENANT_LANE_BATCHES` or `SOMA_LANE_KEEP_BYTES` of a lane."""
    lane_keep_bytes: int = Field(default=1024**3, ge=0)
    """Most bytes of a lane that are kept for `SOMA_LANE_PURGE_LAG_S`."""
