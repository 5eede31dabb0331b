"""What an agent may be. The contract's message is the entity: a second class for it would have to agree with it."""

from __future__ import annotations

from typing import Final

from google.protobuf.field_mask_pb2 import FieldMask
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec

from services.controlplane.domain.field_mask import merged
from services.controlplane.domain.names import AgentName
from services.controlplane.domain.refusals import invalid_field
from services.controlplane.domain.text import check_text
from services.controlplane.domain.version import Stamp, check_etag, etag_of, revision_of

WRITABLE: Final = ("display_name", "spec")
"""The fields a caller may set; all others are the server's."""

SUPPORTED_POLICIES: Final = (ArrivalPolicy.ARRIVAL_POLICY_UNSPECIFIED, ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE)
"""What this release does with a message that arrives during a turn."""


def new_agent(name: AgentName, wanted: Agent, stamp: Stamp) -> Agent:
    """The agent `name` as its creator wants it.

    Raises:
        InvalidRequest: a field breaks a rule, or asks for what this release cannot do.
    """
    agent = merged(Agent(), wanted, FieldMask(paths=["*"]), WRITABLE)
    _check(agent)
    agent.name = str(name)
    agent.create_time.FromDatetime(stamp.time)
    return _stamped(agent, stamp)


def changed_agent(stored: Agent, patch: Agent, mask: FieldMask | None, stamp: Stamp) -> Agent | None:
    """`stored` with the fields of `patch` that `mask` names; None when that changes nothing.

    Raises:
        Conflict: the patch carries an etag that is not the stored one.
        InvalidRequest: the mask or a field breaks a rule, or asks for what this release cannot do.
    """
    check_etag(stored.name, patch.etag, stored.etag)
    agent = merged(stored, patch, mask, WRITABLE)
    _check(agent)
    return None if agent == stored else _stamped(agent, stamp)


def _stamped(agent: Agent, stamp: Stamp) -> Agent:
    agent.revision = revision_of(agent.spec)
    agent.etag = etag_of(agent.name, stamp.version)
    agent.update_time.FromDatetime(stamp.time)
    return agent


def _check(agent: Agent) -> None:
    """The rules that the contract's annotations cannot say: they also hold for what a mask leaves over."""
    check_text("agent.display_name", agent.display_name)
    check_text("agent.spec.instructions", agent.spec.instructions)
    if not agent.spec.model:
        raise invalid_field("agent.spec.model", "a model is required, as provider/name, for example offline/assistant")
    _check_policy(agent.spec)


def _check_policy(spec: AgentSpec) -> None:
    if spec.arrival_policy in SUPPORTED_POLICIES:
        return
    values = ArrivalPolicy.DESCRIPTOR.values_by_number
    asked = values[spec.arrival_policy].name if spec.arrival_policy in values else str(spec.arrival_policy)
    supported = ArrivalPolicy.Name(ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE)
    raise invalid_field(
        "agent.spec.arrival_policy",
        f"this release supports {supported}, not {asked}",
        metadata={"supported": supported, "asked": asked},
    )
