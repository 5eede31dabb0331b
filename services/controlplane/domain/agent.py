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
BY_VERB: Final = {"paused": "PauseAgent and ResumeAgent"}
"""The server's fields that a caller changes by a verb of their own, and which."""

DEFAULT_DEBOUNCE_MS: Final = 300
DEFAULT_DEBOUNCE_MAX_MS: Final = 2000
"""What 0 means, as the contract has it."""


def new_agent(name: AgentName, wanted: Agent, stamp: Stamp) -> Agent:
    """The agent `name` as its creator wants it.

    Raises:
        InvalidRequest: a field breaks a rule.
    """
    agent = merged(Agent(), wanted, FieldMask(paths=["*"]), WRITABLE, BY_VERB)
    _check(agent)
    agent.name = str(name)
    agent.create_time.FromDatetime(stamp.time)
    return _stamped(agent, stamp)


def changed_agent(stored: Agent, patch: Agent, mask: FieldMask | None, stamp: Stamp) -> Agent | None:
    """`stored` with the fields of `patch` that `mask` names; None when that changes nothing.

    Raises:
        Conflict: the patch carries an etag that is not the stored one.
        InvalidRequest: the mask or a field breaks a rule.
    """
    check_etag(stored.name, patch.etag, stored.etag)
    agent = merged(stored, patch, mask, WRITABLE, BY_VERB)
    _check(agent)
    return None if agent == stored else _stamped(agent, stamp)


def paused_agent(stored: Agent, etag: str, stamp: Stamp, *, paused: bool) -> Agent | None:
    """`stored` with its pause begun or ended; None when that changes nothing.

    Raises:
        Conflict: `etag` is set and not the stored one.
    """
    check_etag(stored.name, etag, stored.etag)
    if stored.paused == paused:
        return None
    agent = Agent()
    agent.CopyFrom(stored)
    agent.paused = paused
    return _stamped(agent, stamp)


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
    if agent.spec.arrival_policy not in ArrivalPolicy.values():
        raise invalid_field(
            "agent.spec.arrival_policy",
            f"there is no policy {agent.spec.arrival_policy}; there are {', '.join(ArrivalPolicy.keys()[1:])}",
        )
    _check_debounce(agent.spec)


def _check_debounce(spec: AgentSpec) -> None:
    """A group that is due before it has been silent for long enough would never wait for the silence."""
    silence = spec.debounce_ms or DEFAULT_DEBOUNCE_MS
    longest = spec.debounce_max_ms or DEFAULT_DEBOUNCE_MAX_MS
    if longest < silence:
        raise invalid_field(
            "agent.spec.debounce_max_ms",
            f"{longest} ms is less than debounce_ms, {silence} ms: raise it or lower debounce_ms"
            f" (not set they are {DEFAULT_DEBOUNCE_MAX_MS} and {DEFAULT_DEBOUNCE_MS})",
        )
