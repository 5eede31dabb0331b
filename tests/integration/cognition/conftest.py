"""A brain as its own `main.start` puts it together, with real sockets on every side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.cognition.application.serve_routers import Brain
from services.cognition.main import start
from services.cognition.settings import CognitionSettings
from soma_common.authz.tokens import generate_key, public_jwks, sign_token
from soma_common.failpoints import arm_failpoints
from soma_common.lifecycle import Lifecycle
from soma_common.testing.model_server import ModelServer
from tests.integration.cognition.counterparts import ScriptedRouter, ToolGateway


@dataclass(frozen=True)
class RunningBrain:
    """A started brain."""

    port: int
    admin_port: int
    brain: Brain
    lifecycle: Lifecycle
    token: str

    def router(self, name: str = "router-0", *, confirming: bool = True, token: str | None = None) -> ScriptedRouter:
        return ScriptedRouter(f"127.0.0.1:{self.port}", token or self.token, name=name, confirming=confirming)


StartBrain = Callable[..., Awaitable[RunningBrain]]


@pytest.fixture
async def model_server() -> AsyncIterator[ModelServer]:
    async with ModelServer() as server:
        yield server


@pytest.fixture
async def tool_gateway() -> AsyncIterator[ToolGateway]:
    gateway = ToolGateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


@pytest.fixture
async def start_brain(
    tmp_path: Path, model_server: ModelServer, tool_gateway: ToolGateway
) -> AsyncIterator[StartBrain]:
    """Starts a brain with the settings a test asks for; stops it at the end in its own order."""
    key = generate_key()
    keys, token_file = tmp_path / "keys.json", tmp_path / "cognition.token"
    keys.write_text(public_jwks([key]))
    token = sign_token(key, "services/router", "*", ["service"], ttl_s=600)
    token_file.write_text(token)
    lifecycles: list[Lifecycle] = []

    async def start_one(**changes: object) -> RunningBrain:
        defaults: dict[str, object] = {
            "service_instance": "cognition-0",
            "auth_keys_file": keys,
            "auth_service_token_file": token_file,
            "toolgw_target": f"127.0.0.1:{tool_gateway.port}",
            "openai_base_url": model_server.base_url,
            "heartbeat_ms": 100,
            "offline_word_delay_ms": 0,
        }
        settings = CognitionSettings.model_validate(defaults | changes)
        lifecycle = Lifecycle()
        lifecycles.append(lifecycle)
        port, admin_port, brain = await start(lifecycle, settings)
        return RunningBrain(port, admin_port, brain, lifecycle, token)

    yield start_one
    arm_failpoints("")
    for lifecycle in lifecycles:
        await lifecycle.stop()


@pytest.fixture
async def brain(start_brain: StartBrain) -> RunningBrain:
    return await start_brain()


@pytest.fixture
async def router(brain: RunningBrain) -> AsyncIterator[ScriptedRouter]:
    """A router that confirms at once."""
    async with brain.router() as connected:
        yield connected
