"""A change that is made once per request id, and answered the same to every retry (AIP-155)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from services.controlplane.application.ports import Ask, Change, ConfigStore
from services.controlplane.domain.refusals import request_id_reused
from services.controlplane.domain.text import check_text


class _Request(Protocol):
    """A request message of a mutation."""

    @property
    def request_id(self) -> str: ...

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # noqa: N802 - protobuf's name


R = TypeVar("R", bound=Message)


def ask(actor: str, method: str, scope: str, request: _Request) -> Ask:
    """What `actor` asks for with `request`; two requests that differ in anything have different fingerprints.

    Raises:
        InvalidRequest: CONTENT_INVALID, the request id cannot be stored.
    """
    check_text("request_id", request.request_id)
    content = request.SerializeToString(deterministic=True)
    fingerprint = blake2b(method.encode() + b"\0" + content, digest_size=16).digest()
    return Ask(actor, method, scope, request.request_id, fingerprint)


async def answer_once(
    store: ConfigStore, asked: Ask, response_type: type[R], apply: Callable[[Change], Awaitable[R]]
) -> R:
    """Run `apply` in one change and keep its response; a retry within the life of its request id gets that response.

    A request that `apply` refuses leaves nothing behind: a retry is judged anew.

    Raises:
        AlreadyExists: REQUEST_ID_REUSED, the id came before with another content.
    """
    async with store.change(asked) as change:
        before = await change.answered() if asked.request_id else None
        if before is not None:
            if before.fingerprint != asked.fingerprint:
                raise request_id_reused(asked.request_id)
            return response_type.FromString(before.response)
        response = await apply(change)
        if asked.request_id:
            await change.remember(response.SerializeToString())
        return response
