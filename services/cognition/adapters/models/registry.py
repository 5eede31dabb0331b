"""Finds the adapter of a provider (port `Models`): the part of an agent's model before the first slash."""

from __future__ import annotations

from collections.abc import Mapping

from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.application.ports import Model
from soma_common.errors import FailedPrecondition, Unavailable


class ModelRegistry:
    """The providers of this brain. `missing` says for a known provider that is not configured what to do about it."""

    def __init__(self, models: Mapping[str, Model], missing: Mapping[str, str]) -> None:
        self._models = dict(models)
        self._missing = dict(missing)

    def of(self, provider: str) -> Model:
        """The provider's adapter. Raises MODEL_REJECTED for an unknown, MODEL_UNAVAILABLE for an unconfigured one."""
        model = self._models.get(provider)
        if model is not None:
            return model
        if provider in self._missing:
            raise Unavailable(
                reasons.ERROR_REASON_MODEL_UNAVAILABLE,
                f"no endpoint for {provider}/... models is configured: {self._missing[provider]}",
                {"provider": provider},
            )
        known = ", ".join(f"{name}/..." for name in sorted({*self._models, *self._missing}))
        raise FailedPrecondition(
            reasons.ERROR_REASON_MODEL_REJECTED,
            f"there is no model provider {provider!r}; set the agent's model to one of {known}",
            {"provider": provider},
        )
