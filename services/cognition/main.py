"""The brain's process: the only place where its parts are put together. `python -m services.cognition.main`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import structlog
from soma.cognition.v1 import cognition_service_pb2_grpc as cognition_grpc

from services.cognition.adapters.metrics import MeteredModel, observe_turns
from services.cognition.adapters.models.echo import EchoModel
from services.cognition.adapters.models.offline import OfflineModel
from services.cognition.adapters.models.registry import ModelRegistry
from services.cognition.adapters.tools_grpc import GrpcTools, NoTools
from services.cognition.adapters.turns_grpc import CognitionService
from services.cognition.application.ports import Model, Tools
from services.cognition.application.run_turn import RunPolicy, TurnRunner
from services.cognition.application.serve_routers import Brain
from services.cognition.settings import CognitionSettings
from soma_common.authz.authorizer import Authorizer
from soma_common.authz.tokens import load_token
from soma_common.grpc.channel import open_channel
from soma_common.grpc.server import GrpcServer
from soma_common.lifecycle import Lifecycle, run_service
from soma_common.settings import load_settings
from soma_common.telemetry.admin import serve_admin

SERVICE = "soma.cognition.v1.CognitionService"

OPENAI_MISSING = (
    "set SOMA_OPENAI_BASE_URL (any OpenAI-compatible endpoint) or SOMA_OPENAI_API_KEY (OpenAI's own), "
    "or give the agent the model offline/assistant"
)

_log = structlog.get_logger(__name__)


async def main(lifecycle: Lifecycle, settings: CognitionSettings) -> None:
    """Starts the brain and says that it is ready."""
    port, admin_port, brain = await start(lifecycle, settings)
    lifecycle.ready(port=port, admin_port=admin_port, brain=brain.name)


async def start(lifecycle: Lifecycle, settings: CognitionSettings) -> tuple[int, int, Brain]:
    """Starts everything and registers how it stops: say so, drain the turns, stop the server, close the ways out.

    Returns the gRPC port, the admin port and the brain.
    """
    models = open_models(lifecycle, settings)
    runner = TurnRunner(models, open_tools(lifecycle, settings), policy_of(settings))
    brain = Brain(
        settings.service_instance,
        runner,
        max_turns=settings.max_turns,
        routers=max(1, len(settings.router_targets)),
    )
    observe_turns(lambda: len(brain.turns))
    server = GrpcServer(
        settings,
        Authorizer.from_settings(settings),
        services=[
            (
                cognition_grpc.add_CognitionServiceServicer_to_server,
                CognitionService(brain, settings.heartbeat_ms / 1000),
                SERVICE,
            )
        ],
    )
    port = await server.start()
    lifecycle.on_stop("grpc server", partial(server.stop, settings.drain_timeout_s), settings.drain_timeout_s + 1)
    admin = await serve_admin(settings, lambda: not brain.draining)
    lifecycle.on_stop("admin server", admin.stop, 1.0)
    lifecycle.on_stop("turns", partial(brain.drain, settings.drain_grace_s), settings.drain_grace_s + 1.5)
    lifecycle.on_stop("health", partial(server.set_serving, False), 1.0)
    await server.set_serving(True)
    return port, admin.port, brain


def open_models(lifecycle: Lifecycle, settings: CognitionSettings) -> ModelRegistry:
    """The providers of models that this brain is configured for."""
    models: dict[str, Model] = {
        "echo": EchoModel(),
        "offline": OfflineModel(settings.offline_word_delay_ms / 1000),
    }
    if settings.openai_base_url is None and settings.openai_api_key is None:
        return ModelRegistry(_metered(models), {"openai": OPENAI_MISSING})
    # The library takes 0.4 s and 40 MB to load: only a brain that uses it pays, above all when it is restarted.
    from services.cognition.adapters.models.openai_chat import OpenAIChat, open_endpoint

    key = settings.openai_api_key
    endpoint = open_endpoint(
        settings.openai_base_url,
        key.get_secret_value() if key is not None else None,
        connect_timeout_s=settings.openai_connect_timeout_s,
        read_timeout_s=settings.openai_read_timeout_s,
        max_connections=settings.openai_max_connections,
    )
    lifecycle.on_stop("model endpoint", endpoint.close, 1.0)
    models["openai"] = OpenAIChat(endpoint)
    return ModelRegistry(_metered(models), {})


def _metered(models: Mapping[str, Model]) -> Mapping[str, Model]:
    return {provider: MeteredModel(provider, model) for provider, model in models.items()}


def open_tools(lifecycle: Lifecycle, settings: CognitionSettings) -> Tools:
    """The tool gateway, if one is configured."""
    if settings.toolgw_target is None:
        _log.warning("tools.none", why="SOMA_TOOLGW_TARGET is not set: agents have no tools")
        return NoTools()
    token = load_token(settings.auth_service_token_file) if settings.auth_service_token_file is not None else None
    channel = open_channel(settings.toolgw_target, token=token, service="toolgw")
    lifecycle.on_stop("tool gateway", channel.close, 1.0)
    return GrpcTools(channel)


def policy_of(settings: CognitionSettings) -> RunPolicy:
    """The bounds that hold for every turn."""
    return RunPolicy(
        model_attempts=settings.model_attempts,
        text_linger_s=settings.text_linger_ms / 1000,
        max_reply_bytes=settings.max_reply_bytes,
        max_result_bytes=settings.max_result_bytes,
        max_turn_bytes=settings.max_turn_bytes,
    )


if __name__ == "__main__":
    _settings = load_settings(CognitionSettings)
    run_service(lambda lifecycle: main(lifecycle, _settings), _settings)
