"""The keys and bearer tokens of a standalone stack: made at the first start, renewed at a start past half their life.

Tokens are JWTs signed with Ed25519; claims: `sub` (who), `tenant` (one tenant, or `*`), `roles`, `iat`, `exp`, `jti`.
The signing key never leaves <home>/auth; the services get the public keys only.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey

from soma_common.embedded.process import write_private
from somastack.home import Home

ALGORITHM = "Ed25519"
"""RFC 9864's name for EdDSA with this one curve."""
LIFETIME_S = 365 * 24 * 3600
EVERY_TENANT = "*"


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
        self._renew(key, self.admin_token_file, "admin", EVERY_TENANT, ["admin"])
        for service in services:
            self._renew(key, self.service_token_file(service), service, EVERY_TENANT, ["service"])
        for tenant in tenants:
            self._renew(key, self.tenant_token_file(tenant), f"{tenant}-channels", tenant, ["channel"])

    def _signing_key(self) -> OKPKey:
        file = self.home.auth / "signing.key"
        if not file.exists():
            made = OKPKey.generate_key("Ed25519", parameters={"kid": uuid.uuid4().hex, "use": "sig", "alg": ALGORITHM})
            write_private(file, json.dumps(made.as_dict(private=True)) + "\n")
        key = OKPKey.import_key(json.loads(file.read_text(encoding="utf-8")))
        write_private(self.keys_file, json.dumps(KeySet([key]).as_dict(private=False), indent=2) + "\n")
        return key

    def _renew(self, key: OKPKey, file: Path, subject: str, tenant: str, roles: list[str]) -> None:
        if _seconds_left(file, key) > LIFETIME_S / 2:
            return
        now = int(time.time())
        claims = {"sub": subject, "tenant": tenant, "roles": roles, "jti": uuid.uuid4().hex}
        lifetime = {"iat": now, "exp": now + LIFETIME_S}
        header = {"alg": ALGORITHM, "kid": key.kid}
        write_private(file, jwt.encode(header, {**claims, **lifetime}, key, algorithms=[ALGORITHM]) + "\n")


def _seconds_left(file: Path, key: OKPKey) -> float:
    """How long the token in `file` is still good for; 0 when there is none, or it was not signed by `key`."""
    try:
        token = jwt.decode(file.read_text(encoding="utf-8").strip(), key, algorithms=[ALGORITHM])
        return float(token.claims["exp"]) - time.time()
    except (FileNotFoundError, JoseError, ValueError, KeyError):
        return 0.0
