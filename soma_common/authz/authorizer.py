"""The one door for identity and permission: verifies the token, asks the policy, remembers both for a short time."""

import time
from collections import OrderedDict
from collections.abc import Callable

import structlog
from soma.common.v1 import error_reason_pb2

from soma_common.authz.engine import Decision, PolicyEngine, default_engine
from soma_common.authz.tokens import Caller, TokenVerifier
from soma_common.errors import PermissionDenied, Unauthenticated
from soma_common.settings import ServiceSettings
from soma_common.telemetry.metrics import counter

DECISION_TTL_S = 5.0
"""How long a decision is used again: the longest time a change of the policy takes to reach everybody."""
CACHED_DECISIONS = 8192
"""Decisions remembered, least recently used dropped first."""

_BEARER = "bearer "
_decisions = counter("soma_authz_decisions_total", "Calls decided by the policy, cached ones included.", ["outcome"])
_allowed, _denied = _decisions.labels("allow"), _decisions.labels("deny")
_log = structlog.get_logger(__name__)

_Question = tuple[Caller, str, str]


class Authorizer:
    """Answers two questions about a call: who is it, and may they. For the event loop's thread only."""

    def __init__(
        self,
        verifier: TokenVerifier,
        engine: PolicyEngine,
        *,
        decision_ttl_s: float = DECISION_TTL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verifier, self._engine = verifier, engine
        self._ttl_s, self._clock = decision_ttl_s, clock
        self._cache: OrderedDict[_Question, tuple[Decision, float]] = OrderedDict()

    @classmethod
    def from_settings(cls, settings: ServiceSettings) -> "Authorizer":
        """Return an authorizer with this release's policy; raises ValueError when no keys file is set or readable."""
        if settings.auth_keys_file is None:
            raise ValueError("SOMA_AUTH_KEYS_FILE is not set: without public keys no caller can be verified")
        return cls(TokenVerifier(settings.auth_keys_file), default_engine())

    def authenticate(self, authorization: str | None) -> Caller:
        """Return who sent the metadata value `authorization` (`Bearer <token>`); raises Unauthenticated."""
        if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
            raise Unauthenticated(
                error_reason_pb2.ERROR_REASON_UNAUTHENTICATED,
                "no bearer token: send metadata `authorization: Bearer <token>`",
            )
        return self._verifier.verify(authorization[len(_BEARER) :].strip())

    def authorize(self, caller: Caller, permission: str, tenant: str) -> None:
        """Return when `caller` may use `permission` in `tenant` ("": no single tenant); raises PermissionDenied."""
        decision = self.decide(caller, permission, tenant)
        if decision.allow:
            _allowed.inc()
            return
        _denied.inc()
        _log.info(
            "authz.denied", subject=caller.subject, permission=permission, tenant=tenant, reasons=list(decision.reasons)
        )
        touched = f"in tenant {tenant!r}" if tenant else "over all tenants"
        raise PermissionDenied(
            error_reason_pb2.ERROR_REASON_PERMISSION_DENIED,
            f"{caller.subject!r} may not use {permission} {touched}: ask for a token with that right",
            {"permission": permission, "tenant": tenant, "policy_reasons": ",".join(decision.reasons)},
        )

    def decide(self, caller: Caller, permission: str, tenant: str) -> Decision:
        """Return the policy's decision, at most `decision_ttl_s` old."""
        question, now = (caller, permission, tenant), self._clock()
        cached = self._cache.get(question)
        if cached is not None and now < cached[1]:
            self._cache.move_to_end(question)
            return cached[0]
        decision = self._engine.decide(caller, permission, tenant)
        self._cache[question] = (decision, now + self._ttl_s)
        if len(self._cache) > CACHED_DECISIONS:
            self._cache.popitem(last=False)
        return decision
