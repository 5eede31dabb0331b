"""Pages of a list (AIP-158): how many items, and a token that says where the next page begins.

A token is opaque to clients, belongs to one list with one set of parameters, and carries a check over both, so that a
damaged token or one of another list is refused instead of skipping items in silence. It grants nothing: every page is
authorized anew, which is why the check needs no secret.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason

from soma_common.errors import FieldViolation, InvalidRequest

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
_CHECK_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for: at most `size` items whose id sorts after `after`."""

    list_id: tuple[str, ...]
    """Names the list and its parameters, for example `("agents", "tenants/demo")`."""
    size: int
    after: str

    @classmethod
    def asked(cls, list_id: tuple[str, ...], page_size: int, page_token: str) -> Page:
        """The page that a request asks for; a size of 0 means 50, and no page is larger than 1000.

        Raises:
            InvalidRequest: PAGE_TOKEN_INVALID.
        """
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        return cls(list_id, size, _read(list_id, page_token) if page_token else "")

    def next_token(self, last: str) -> str:
        """The token of the page after the one that ends with `last`."""
        cursor = last.encode()
        return base64.urlsafe_b64encode(_check(self.list_id, cursor) + cursor).rstrip(b"=").decode()


def _read(list_id: tuple[str, ...], token: str) -> str:
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        check, cursor = raw[:_CHECK_BYTES], raw[_CHECK_BYTES:]
        if check != _check(list_id, cursor):
            raise _invalid()
        return cursor.decode()
    except (binascii.Error, ValueError) as error:
        raise _invalid() from error


def _check(list_id: tuple[str, ...], cursor: bytes) -> bytes:
    digest = blake2b(digest_size=_CHECK_BYTES, person=b"soma-page")
    for part in (*(item.encode() for item in list_id), cursor):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def _invalid() -> InvalidRequest:
    return InvalidRequest(
        ErrorReason.ERROR_REASON_PAGE_TOKEN_INVALID,
        "page_token is not one of this list: send next_page_token of the page before, with the same parameters",
        field_violations=[FieldViolation(field="page_token", description="not a token of this list")],
    )
