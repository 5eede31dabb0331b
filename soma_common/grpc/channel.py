"""How a service calls another: a channel that notices dead peers, retries what may be retried and says who calls.

The bearer token, the trace context and the deadline of the call being served go with every call. They are added by
a thin channel around gRPC's own, not by client interceptors: those put a task and a queue between a stream and its
frames.
"""

import json
from collections.abc import Callable
from typing import Any

import grpc
from soma.common.v1 import error_reason_pb2

from soma_common.errors import DeadlineExceeded
from soma_common.grpc.call_context import time_left_s
from soma_common.grpc.service_config import DEFAULT_UNARY_TIMEOUT_S, retries_of, short_name, timeout_of
from soma_common.telemetry.trace import TRACEPARENT, current_trace

Token = Callable[[], str]
"""Returns the present bearer token; soma_common.authz.tokens.load_token makes one from a file."""


def open_channel(
    target: str,
    *,
    token: Token | None,
    service: str,
    wait_for_ready: bool | None = None,
    max_message_bytes: int = 16 * 1024 * 1024,
) -> grpc.aio.Channel:
    """Return a channel to `target`: `host:port`, or several as `host:port,host:port` to take turns.

    `service` is the peer's short name (`router`) or the full name of one of its services; it picks the retries
    (soma_common/grpc/service_config). A unary call without a timeout gets its method's default from there; one that the
    caller gives counts as it is, shorter or longer. `token` is asked before each call; None sends no identity. With
    `wait_for_ready` calls wait for the peer up to their deadline; without it they fail with UNAVAILABLE while it
    cannot be reached. An address whose health is NOT_SERVING gets no calls. Each channel has connections of its own.
    """
    channel = grpc.aio.insecure_channel(_resolvable(target), options=_options(short_name(service), max_message_bytes))
    return _IdentifiedChannel(channel, token, wait_for_ready)


class _IdentifiedChannel(grpc.aio.Channel):
    """A channel that adds what every call carries; all else is the inner channel's."""

    def __init__(self, inner: grpc.aio.Channel, token: Token | None, wait_for_ready: bool | None) -> None:
        self._inner, self._token, self._wait_for_ready = inner, token, wait_for_ready

    async def __aenter__(self) -> "_IdentifiedChannel":
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        made = self._inner.unary_unary(method, *args, **kwargs)
        return self._calling(made, has_request=True, bound=True, default_timeout_s=_default_timeout_s(method))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._calling(self._inner.unary_stream(*args, **kwargs), has_request=True, bound=False)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._calling(self._inner.stream_unary(*args, **kwargs), has_request=False, bound=False)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._calling(self._inner.stream_stream(*args, **kwargs), has_request=False, bound=False)

    def _calling(self, make: Any, *, has_request: bool, bound: bool, default_timeout_s: float | None = None) -> Any:
        """Return a callable like `make` that adds metadata, `default_timeout_s` to a call without a timeout and, when
        `bound`, the deadline of the call being served.
        """

        def call(
            request: Any = None,
            *,
            timeout: float | None = None,
            metadata: Any = None,
            wait_for_ready: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            if timeout is None:
                timeout = default_timeout_s
            if bound:
                timeout = _shorter(timeout, time_left_s())
            wait = self._wait_for_ready if wait_for_ready is None else wait_for_ready
            arguments = (request,) if has_request or request is not None else ()
            return make(
                *arguments,
                timeout=timeout,
                metadata=call_metadata(self._token, metadata),
                wait_for_ready=wait,
                **kwargs,
            )

        return call


def call_metadata(token: Token | None, given: Any) -> tuple[tuple[str, str | bytes], ...]:
    """What goes with a call: what is given, who calls and in which trace."""
    metadata: list[tuple[str, str | bytes]] = list(given or ())
    if token is not None:
        metadata.append(("authorization", f"Bearer {token()}"))
    if (trace := current_trace()) is not None:
        metadata.append((TRACEPARENT, str(trace)))
    return tuple(metadata)


def _default_timeout_s(path: str | bytes) -> float:
    """The timeout of a unary method, named as `/soma.router.v1.TurnService/GetTurn`, for callers that give none."""
    _, service, method = (path.decode() if isinstance(path, bytes) else path).split("/")
    return timeout_of(service, method) or DEFAULT_UNARY_TIMEOUT_S


def _shorter(timeout: float | None, left: float | None) -> float | None:
    if left is None:
        return timeout
    if left <= 0:
        raise DeadlineExceeded(
            error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED, "the deadline of the call being served is over"
        )
    return left if timeout is None else min(timeout, left)


def _resolvable(target: str) -> str:
    """Return `1.2.3.4:1,1.2.3.5:1` in the form gRPC understands; a single address or a URI is returned as it is."""
    return f"ipv4:{target}" if "," in target and not target.startswith(("ipv4:", "ipv6:")) else target


def _options(service: str, max_message_bytes: int) -> list[tuple[str, Any]]:
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
        **retries_of(service),
    }
    return [
        ("grpc.service_config", json.dumps(config)),
        # Channels to one address would share a connection and, with it, the watcher of its health. gRPC 1.85 makes that
        # visible to the second channel before it has been started for the first one: if both connect in the same
        # microseconds, on two threads, the process dies of SIGSEGV (in the constructor of HealthProducer's checker).
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 2_000),
        # Without this a frozen peer is never noticed: keepalive alone does not close the connection.
        ("grpc.http2.ping_timeout_ms", 2_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        # A peer that was restarted is found again within a second, not after gRPC's default of up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
