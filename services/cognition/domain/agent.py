"""What a turn needs to know of its agent, with the contract's defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from google.protobuf.message import DecodeError
from soma.common.v1 import error_reason_pb2 as reasons
from soma.controlplane.v1 import agent_service_pb2

from soma_common.errors import Internal

DEFAULT_STEP_TIMEOUT_MS: Final = 60_000
DEFAULT_TURN_TIMEOUT_MS: Final = 600_000
DEFAULT_MAX_STEPS: Final = 32


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent's spec as a brain uses it; what 0 means in the contract (soma.controlplane.v1.AgentSpec) is resolved."""

    provider: str
    model: str
    instructions: str
    tools: tuple[str, ...]
    step_timeout_s: float
    turn_timeout_s: float
    max_steps: int
    temperature: float | None
    max_output_tokens: int | None


@lru_cache(maxsize=256)
def read_agent(spec: bytes) -> Agent:
    """Reads a serialized AgentSpec; agents are few and turns are many, so the last ones are kept. Raises
    ITEM_CORRUPT."""
    try:
        parsed = agent_service_pb2.AgentSpec.FromString(spec)
    except DecodeError as error:
        raise Internal(reasons.ERROR_REASON_ITEM_CORRUPT, f"the turn's agent spec cannot be read: {error}") from error
    provider, _, model = parsed.model.partition("/")
    return Agent(
        provider=provider,
        model=model,
        instructions=parsed.instructions,
        tools=tuple(parsed.tools),
        step_timeout_s=(parsed.step_timeout_ms or DEFAULT_STEP_TIMEOUT_MS) / 1000,
        turn_timeout_s=(parsed.turn_timeout_ms or DEFAULT_TURN_TIMEOUT_MS) / 1000,
        max_steps=parsed.max_steps or DEFAULT_MAX_STEPS,
        temperature=parsed.temperature_millis / 1000 if parsed.HasField("temperature_millis") else None,
        max_output_tokens=parsed.max_output_tokens or None,
    )
