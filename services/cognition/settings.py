"""What the brain needs to know beside what every service needs (soma_common/settings.py). Environment:
`SOMA_<FIELD>`."""

from __future__ import annotations

from pydantic import Field, SecretStr

from soma_common.settings import ServiceSettings


class CognitionSettings(ServiceSettings):
    """Settings of one brain process."""

    max_turns: int = Field(default=1024, ge=1, le=100_000)
    """Turns that run at once in this process, over all routers. Each router gets an equal share as credit, for as
    many as `SOMA_ROUTER_TARGETS` names (one if it is unset)."""
    heartbeat_ms: int = Field(default=500, ge=50, le=60_000)
    """Interval of the heartbeats on RunTurns, in milliseconds. A router silent for four of them is taken for dead."""
    drain_grace_s: float = Field(default=2.5, ge=0)
    """How long running turns may go on after the stop signal, in seconds; what still runs is handed back to its
    router."""

    text_linger_ms: int = Field(default=20, ge=0, le=1000)
    """Shortest time between two pieces of live text of a turn, in milliseconds. The first piece goes at once."""
    max_reply_bytes: int = Field(default=256 * 1024, ge=1024)
    """Longest reply of a model, its tool calls included, and longest answer of a turn, its interim replies included; a
    longer one ends the turn with MODEL_REJECTED."""
    max_result_bytes: int = Field(default=256 * 1024, ge=1024)
    """Largest result of a tool; the model is told of a larger one that it was too large."""
    max_turn_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Most bytes of a turn's steps before another model call; with more it ends with CONTEXT_TOO_LONG."""
    model_attempts: int = Field(default=3, ge=1, le=100)
    """Tries of one model call when the endpoint limits the rate or fails, within the step's time."""

    openai_base_url: str | None = None
    """Address of an OpenAI-compatible endpoint, with its version, such as `http://127.0.0.1:8000/v1`. Unset with a
    key set: OpenAI's own."""
    openai_api_key: SecretStr | None = None
    """Key for the endpoint; unset with an address set: none is needed."""
    openai_connect_timeout_s: float = Field(default=5.0, gt=0)
    """How long a connection to the endpoint may take."""
    openai_read_timeout_s: float = Field(default=60.0, gt=0)
    """How long the endpoint may be silent, before its answer and within it. The agent's step timeout bounds the
    whole."""
    openai_max_connections: int = Field(default=256, ge=1)
    """Connections to the endpoint at once; further calls wait for one within their step's time."""

    offline_word_delay_ms: int = Field(default=15, ge=0, le=1000)
    """Wait before each word of the offline model, in milliseconds, so that streaming can be seen."""
