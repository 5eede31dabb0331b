"""Identities for tests: a key pair of their own and tokens signed with it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from joserfc.jwk import OKPKey

from soma_common.authz.authorizer import Authorizer
from soma_common.authz.engine import default_engine
from soma_common.authz.tokens import TokenVerifier, generate_key, public_jwks, sign_token


class Identities:
    """Issues tokens that servers with `keys_file` accept. Everything lives in `folder` (a test's `tmp_path`)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.key: OKPKey = generate_key()
        self.keys_file = folder / "keys.json"
        """For SOMA_AUTH_KEYS_FILE."""
        self.keys_file.write_text(public_jwks([self.key]), encoding="utf-8")

    def token(
        self, subject: str = "tester", tenant: str = "*", roles: Sequence[str] = ("admin",), ttl_s: float = 3600.0
    ) -> str:
        """Return a token; a negative `ttl_s` makes one that has expired already."""
        return sign_token(self.key, subject, tenant, roles, ttl_s=ttl_s)

    def service_token_file(self, service: str = "tester") -> Path:
        """Return a file with a service's token, for SOMA_AUTH_SERVICE_TOKEN_FILE."""
        path = self._folder / f"{service}.token"
        path.write_text(self.token(service, "*", ["service"]), encoding="utf-8")
        return path

    def bearer(
        self, subject: str = "tester", tenant: str = "*", roles: Sequence[str] = ("admin",)
    ) -> Callable[[], str]:
        """Return what `open_channel(token=...)` takes."""
        token = self.token(subject, tenant, roles)
        return lambda: token

    def authorizer(self) -> Authorizer:
        """Return an authorizer that accepts these tokens under this release's policy."""
        return Authorizer(TokenVerifier(self.keys_file), default_engine())
