"""The keys and bearer tokens of a standalone stack: made at the first start, renewed at a start past half their life.

The tokens' form is that of `soma_common.authz.tokens`. The signing key never leaves <home>/auth; the services get the
public keys only.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from soma_common.authz.tokens import (
    ALGORITHM,
    ALL_TENANTS,
    dump_signing_key,
    generate_key,
    load_signing_key,
    public_jwks,
    sign_token,
)
from soma_common.embedded.process import write_private
from somastack.home import Home

LIFETIME_S = 365 * 24 * 3600


@dataclass(frozen=True)
class AuthMaterial:
    """Where the key and the tokens of a home are; `make` creates them."""

    home: Home

    @property
    def keys_file(self) -> Path:
        """The public keys, as JWKS."""
        return self.home.auth / "keys.json"

    @property
    def admin_token_file(self) -> Path:
        """The administrator's token: every right, every tenant."""
        return self.home.auth / "admin.token"

    def service_token_file(self, service: str) -> Path:
        """The token of one service: what services may do to each other, every tenant."""
        return self.home.auth / "services" / f"{service}.token"

    def tenant_token_file(self, tenant: str) -> Path:
        """The token of one tenant's channels."""
        return self.home.auth / "tenants" / f"{tenant}.token"

    def make(self, services: Sequence[str], tenants: Sequence[str]) -> None:
        """Create the key and the tokens that are missing, too old, or not of this key."""
        key = self._signing_key()
        self._renew(key, self.admin_token_file, "admin", ALL_TENANTS, ["admin"])
        for service in services:
            self._renew(key, self.service_token_file(service), service, ALL_TENANTS, ["service"])
        for tenant in tenants:
            self._renew(key, self.tenant_token_file(tenant), f"{tenant}-channels", tenant, ["channel"])

    def _signing_key(self) -> OKPKey:
        file = self.home.auth / "signing.key"
        if not file.exists():
            write_private(file, dump_signing_key(generate_key()) + "\n")
        key = load_signing_key(file)
        write_private(self.keys_file, public_jwks([key]) + "\n")
        return key

    def _renew(self, key: OKPKey, file: Path, subject: str, tenant: str, roles: list[str]) -> None:
        if _seconds_left(file, key) < LIFETIME_S / 2:
            write_private(file, sign_token(key, subject, tenant, roles, ttl_s=LIFETIME_S) + "\n")


def _seconds_left(file: Path, key: OKPKey) -> float:
    """How long the token in `file` is still good for; 0 when there is none, or it was not signed by `key`."""
    try:
        token = jwt.decode(file.read_text(encoding="utf-8").strip(), key, algorithms=[ALGORITHM])
        return float(token.claims["exp"]) - time.time()
    except (FileNotFoundError, JoseError, ValueError, KeyError):
        return 0.0
