"""The keys and bearer tokens of a standalone stack: made at the first start, renewed at a start past half their life.

The tokens' form is that of `soma_common.authz.tokens`. The signing key never leaves <home>/auth; the services get the
public keys only.
"""

import re
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
from soma_common.embedded.process import PartFailed, write_private
from somastack.home import Home

LIFETIME_S = 365 * 24 * 3600
TENANT_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""As the contract has it (`soma.common.v1.SessionKey.tenant`)."""


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
        """Create the key and the tokens that are missing, too old, or not of this key.

        A tenant that got a token by `issue` keeps having one, without being named here.
        """
        key = self._signing_key()
        self._renew(key, self.admin_token_file, "admin", ALL_TENANTS, ["admin"])
        for service in services:
            self._renew(key, self.service_token_file(service), service, ALL_TENANTS, ["service"])
        issued = (file.stem for file in self.tenant_token_file("any").parent.glob("*.token"))
        for tenant in sorted({*tenants, *issued}):
            self._renew_channels(key, tenant)

    def issue(self, tenant: str) -> Path:
        """Create or renew the token of a tenant's channels; returns its file.

        Raises:
            PartFailed: this is no tenant's id, or the home has no key yet.
        """
        if not TENANT_ID.fullmatch(tenant):
            raise PartFailed(f"{tenant!r} is no tenant's id", "ids are lower-case letters, digits and inner hyphens")
        if not self._key_file.exists():
            raise PartFailed(
                f"{self.home.path} has no signing key yet", f"start the stack once: {self.home.command('up', '--demo')}"
            )
        self._renew_channels(self._signing_key(), tenant)
        return self.tenant_token_file(tenant)

    @property
    def _key_file(self) -> Path:
        return self.home.auth / "signing.key"

    def _signing_key(self) -> OKPKey:
        if not self._key_file.exists():
            write_private(self._key_file, dump_signing_key(generate_key()) + "\n")
        key = load_signing_key(self._key_file)
        write_private(self.keys_file, public_jwks([key]) + "\n")
        return key

    def _renew_channels(self, key: OKPKey, tenant: str) -> None:
        self._renew(key, self.tenant_token_file(tenant), f"{tenant}-channels", tenant, ["channel"])

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
