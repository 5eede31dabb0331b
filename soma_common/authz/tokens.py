"""Bearer tokens: Ed25519-signed JWTs that say who calls.

Claims: `sub` (who), `tenant` (one tenant's id, or `*` for all), `roles` (list of role names), `iat`, `exp` (seconds
since the epoch), `jti` (unique id). The header's `kid` names the key; the public keys are a JWKS file.
"""

import hashlib
import json
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey
from soma.common.v1 import error_reason_pb2

from soma_common.errors import Unauthenticated

ALGORITHM = "Ed25519"
"""The JWS algorithm, by its full name of RFC 9864."""

ALL_TENANTS = "*"
"""Value of the claim `tenant` of a subject that may act for every tenant."""

MAX_TOKEN_CHARS = 4096
"""A longer token is refused unread."""
CACHED_TOKENS = 4096
"""Verified tokens remembered; verifying one costs about 0.14 ms."""
CLOCK_SKEW_S = 5
"""How far a token's issuer may be ahead of this machine's clock."""
RELOAD_INTERVAL_S = 1.0
"""The keys file is looked at again at most this often."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: a verified identity. `tenant` is one tenant's id, or `*` for all."""

    subject: str
    tenant: str
    roles: tuple[str, ...]
    expires: float = field(default=math.inf, compare=False)
    """When the token that says so expires, seconds since the epoch. A caller with a new token is the same caller."""

    @property
    def all_tenants(self) -> bool:
        """True when the subject may act for every tenant."""
        return self.tenant == ALL_TENANTS


def generate_key() -> OKPKey:
    """Return a new Ed25519 key pair with a `kid` derived from its public part (RFC 7638)."""
    key = OKPKey.generate_key("Ed25519")
    key.ensure_kid()
    return key


def load_signing_key(path: Path) -> OKPKey:
    """Return the private key in the JWK file at `path`."""
    return OKPKey.import_key(json.loads(path.read_text(encoding="utf-8")))


def dump_signing_key(key: OKPKey) -> str:
    """Return the private key as a JWK; the file it goes to must be readable by its owner only."""
    return json.dumps(key.as_dict(private=True))


def public_jwks(keys: Sequence[OKPKey]) -> str:
    """Return the public parts of `keys` as a JWKS, the content of the keys file."""
    return json.dumps(
        {"keys": [{**key.as_dict(private=False), "alg": ALGORITHM, "use": "sig"} for key in keys]}, indent=2
    )


def sign_token(
    key: OKPKey, subject: str, tenant: str, roles: Sequence[str], *, ttl_s: float, now: float | None = None
) -> str:
    """Return a token for `subject` that is valid for `ttl_s` seconds from `now` (seconds since the epoch; default:
    the clock).
    """
    issued = int(time.time() if now is None else now)
    claims = {
        "sub": subject,
        "tenant": tenant,
        "roles": list(roles),
        "iat": issued,
        "exp": issued + int(ttl_s),
        "jti": secrets.token_hex(16),
    }
    key.ensure_kid()
    return jwt.encode({"alg": ALGORITHM, "kid": key.kid}, claims, key, algorithms=[ALGORITHM])


class TokenVerifier:
    """Verifies tokens against the keys in a JWKS file, which is read again when it changes."""

    def __init__(self, keys_file: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Raises ValueError when the keys file cannot be used."""
        self._keys_file, self._clock = keys_file, clock
        self._verified: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        self._stamp = (0, 0)
        self._looked_at = clock()
        try:
            self._keys = self._read_keys()
        except (OSError, ValueError, JoseError) as error:
            raise ValueError(f"cannot read the public keys in {keys_file}: {error}") from error

    def verify(self, token: str) -> Caller:
        """Return who `token` speaks for; raises Unauthenticated when it is missing, malformed, forged or expired."""
        now = self._clock()
        self._renew_keys(now)
        digest = hashlib.blake2b(token.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        known = self._verified.get(digest)
        if known is not None and now < known[1]:
            self._verified.move_to_end(digest)
            return known[0]
        caller, expires = self._verify_now(token, now)
        self._verified[digest] = (caller, expires)
        if len(self._verified) > CACHED_TOKENS:
            self._verified.popitem(last=False)
        return caller

    def _verify_now(self, token: str, now: float) -> tuple[Caller, float]:
        if not token or len(token) > MAX_TOKEN_CHARS:
            raise _refused("send metadata `authorization: Bearer <token>`")
        try:
            claims = jwt.decode(token, self._keys, algorithms=[ALGORITHM]).claims
        except (JoseError, ValueError, KeyError, TypeError) as error:
            _log.info("auth.token_refused", why=type(error).__name__)
            raise _refused("the token is malformed or not signed with a known key") from error
        caller, issued, expires = _read_claims(claims)
        if issued > now + CLOCK_SKEW_S:
            raise _refused("the token is from the future: compare the clocks")
        if now >= expires:
            raise _refused("the token has expired: get a new one")
        return caller, expires

    def _renew_keys(self, now: float) -> None:
        if 0 <= now - self._looked_at < RELOAD_INTERVAL_S:
            return
        self._looked_at = now
        try:
            if _stamp_of(self._keys_file) == self._stamp:
                return
            self._keys = self._read_keys()
            self._verified.clear()  # A key may have been withdrawn.
        except (OSError, ValueError, JoseError) as error:
            # Half-written or gone: the keys known so far stay valid, the next look may do better.
            _log.error("auth.keys_unreadable", path=str(self._keys_file), error=str(error))

    def _read_keys(self) -> KeySet:
        stamp = _stamp_of(self._keys_file)
        keys = KeySet.import_key_set(json.loads(self._keys_file.read_text(encoding="utf-8")))
        self._stamp = stamp
        return keys


class TokenFile:
    """A token kept in a file by whoever issues it. Calling this returns the present token, reading again when it
    changed.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._token = ""
        self._stamp = (0, 0)
        self._looked_at = -RELOAD_INTERVAL_S

    def __call__(self) -> str:
        """Return the token; raises Unauthenticated when there never was a readable one."""
        now = self._clock()
        if now - self._looked_at >= RELOAD_INTERVAL_S or not self._token:
            self._looked_at = now
            self._renew()
        return self._token

    def _renew(self) -> None:
        try:
            stamp = _stamp_of(self._path)
            if stamp != self._stamp or not self._token:
                self._token = self._path.read_text(encoding="utf-8").strip() or self._token
                self._stamp = stamp
        except OSError as error:
            if not self._token:
                raise _refused(f"cannot read this service's own token in {self._path}") from error


def load_token(path: Path) -> Callable[[], str]:
    """Return a function that gives the token in the file at `path`, always the present one."""
    return TokenFile(path)


def _read_claims(claims: Mapping[str, Any]) -> tuple[Caller, float, float]:
    subject, tenant, roles = claims.get("sub"), claims.get("tenant"), claims.get("roles")
    issued, expires = claims.get("iat"), claims.get("exp")
    named = isinstance(subject, str) and subject and isinstance(tenant, str) and tenant
    listed = isinstance(roles, list) and all(isinstance(role, str) for role in roles)
    timed = all(isinstance(at, (int, float)) and not isinstance(at, bool) for at in (issued, expires))
    if not (named and listed and timed):
        raise _refused("the token lacks one of the claims sub, tenant, roles, iat, exp")
    assert isinstance(subject, str)
    assert isinstance(tenant, str)
    assert isinstance(roles, list)
    caller = Caller(subject, tenant, tuple(roles), float(expires or 0))
    return caller, float(issued or 0), caller.expires


def _refused(what_to_do: str) -> Unauthenticated:
    return Unauthenticated(error_reason_pb2.ERROR_REASON_UNAUTHENTICATED, f"no valid bearer token: {what_to_do}")


def _stamp_of(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino
