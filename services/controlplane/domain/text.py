"""Texts an administrator may write: what can be stored, sent to a model and shown."""

from __future__ import annotations

from soma.common.v1.error_reason_pb2 import ErrorReason

from services.controlplane.domain.refusals import invalid_field


def check_text(field: str, value: str) -> None:
    """Refuse U+0000, which neither PostgreSQL's text nor many a model endpoint takes.

    Raises:
        InvalidRequest: CONTENT_INVALID.
    """
    position = value.find("\0")
    if position >= 0:
        raise invalid_field(
            field, f"U+0000 at character {position}: remove it", ErrorReason.ERROR_REASON_CONTENT_INVALID
        )
