"""Only tokens that are signed by a known key, complete and in date say who calls."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey

from soma_common.authz.authorizer import Authorizer
from soma_common.authz.engine import Decision
from soma_common.authz.tokens import (
    ALGORITHM,
    CACHED_TOKENS,
    Caller,
    TokenFile,
    TokenVerifier,
    dump_signing_key,
    generate_key,
    load_signing_key,
    public_jwks,
    sign_token,
)
from soma_common.errors import PermissionDenied, Unauthenticated
from soma_common.settings import ServiceSettings
from soma_common.testing.auth import Identities


class Clock:
    """Time that stands still until told."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path)


@pytest.fixture
def verifier(identities: Identities, clock: Clock) -> TokenVerifier:
    return TokenVerifier(identities.keys_file, clock=clock)


def test_a_good_token_says_who_calls(identities: Identities, verifier: TokenVerifier) -> None:
    token = identities.token("adapter", "demo", ["channel"])
    for _again in range(2):
        assert verifier.verify(token) == Caller("adapter", "demo", ("channel",))
    assert not verifier.verify(token).all_tenants
    assert verifier.verify(identities.token()).all_tenants


def test_a_caller_is_known_until_its_token_expires_and_is_the_same_with_the_next(
    identities: Identities, verifier: TokenVerifier, clock: Clock
) -> None:
    first, second = (verifier.verify(identities.token(ttl_s=ttl_s)) for ttl_s in (60, 600))
    assert 59 <= first.expires - clock.now <= 60
    assert 599 <= second.expires - clock.now <= 600
    assert first == second
    assert hash(first) == hash(second)


def test_a_token_ends_when_it_says_even_if_known(identities: Identities, verifier: TokenVerifier, clock: Clock) -> None:
    token = identities.token(ttl_s=60)
    verifier.verify(token)
    clock.now += 61
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


def test_a_token_from_the_future_is_refused(identities: Identities, verifier: TokenVerifier, clock: Clock) -> None:
    token = sign_token(identities.key, "a", "*", [], ttl_s=1e6, now=clock.now + 3600)
    with pytest.raises(Unauthenticated, match="clocks"):
        verifier.verify(token)


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "\udcff", "é" * 10, "x" * 5000, "eyJhbGciOiJub25lIn0.e30."])
def test_what_is_no_token_is_refused(verifier: TokenVerifier, token: str) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(token)


def test_a_token_of_a_strange_key_is_refused(verifier: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated, match="known key"):
        verifier.verify(sign_token(generate_key(), "a", "*", ["admin"], ttl_s=60))


def test_a_strange_key_under_a_known_id_is_refused(identities: Identities, verifier: TokenVerifier) -> None:
    stranger = generate_key()
    forged = jwt.encode({"alg": ALGORITHM, "kid": identities.key.kid}, {"sub": "a"}, stranger, algorithms=[ALGORITHM])
    with pytest.raises(Unauthenticated, match="known key"):
        verifier.verify(forged)


def test_the_public_key_is_no_shared_secret(identities: Identities, verifier: TokenVerifier) -> None:
    secret = OctKey.import_key(json.dumps(identities.key.as_dict(private=False)))
    forged = jwt.encode({"alg": "HS256", "kid": identities.key.kid}, {"sub": "a"}, secret, algorithms=["HS256"])
    with pytest.raises(Unauthenticated, match="known key"):
        verifier.verify(forged)


def test_a_changed_claim_breaks_the_signature(identities: Identities, verifier: TokenVerifier) -> None:
    head, _, signature = identities.token("adapter", "demo", ["channel"]).split(".")
    _, other_body, _ = identities.token("adapter", "*", ["admin"]).split(".")
    with pytest.raises(Unauthenticated, match="known key"):
        verifier.verify(f"{head}.{other_body}.{signature}")


@pytest.mark.parametrize(
    "change",
    [
        {"sub": ""},
        {"sub": 7},
        {"tenant": None},
        {"tenant": ""},
        {"roles": "admin"},
        {"roles": [1]},
        {"exp": "soon"},
        {"exp": None},
        {"exp": True},
        {"iat": None},
    ],
)
def test_a_token_without_its_claims_is_refused(
    identities: Identities, verifier: TokenVerifier, clock: Clock, change: dict[str, Any]
) -> None:
    claims = {"sub": "a", "tenant": "*", "roles": [], "iat": int(clock.now), "exp": int(clock.now) + 60, **change}
    present = {name: value for name, value in claims.items() if value is not None}
    token = jwt.encode({"alg": ALGORITHM, "kid": identities.key.kid}, present, identities.key, algorithms=[ALGORITHM])
    with pytest.raises(Unauthenticated):
        verifier.verify(token)


def test_keys_are_read_again_and_a_withdrawn_key_ends_its_tokens(
    identities: Identities, verifier: TokenVerifier, clock: Clock
) -> None:
    old = identities.token(ttl_s=1e6)
    verifier.verify(old)
    new_key = generate_key()
    identities.keys_file.write_text("half-writ")
    clock.now += 2
    verifier.verify(old)
    replacement = identities.keys_file.with_suffix(".new")
    replacement.write_text(public_jwks([new_key]))
    replacement.replace(identities.keys_file)
    clock.now += 2
    verifier.verify(sign_token(new_key, "a", "*", [], ttl_s=60))
    with pytest.raises(Unauthenticated):
        verifier.verify(old)


def test_a_missing_keys_file_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keys\.json"):
        TokenVerifier(tmp_path / "keys.json")
    with pytest.raises(ValueError, match="SOMA_AUTH_KEYS_FILE"):
        Authorizer.from_settings(ServiceSettings(service_instance="router-0"))


def test_remembered_tokens_are_bounded(identities: Identities, verifier: TokenVerifier) -> None:
    caller = verifier.verify(identities.token())
    for number in range(CACHED_TOKENS):
        verifier._verified[b"%d" % number] = (caller, 0.0)
    verifier.verify(identities.token("last"))
    assert len(verifier._verified) <= CACHED_TOKENS + 1


def test_a_signing_key_survives_its_file(tmp_path: Path, identities: Identities, verifier: TokenVerifier) -> None:
    path = tmp_path / "signing.key"
    path.write_text(dump_signing_key(identities.key))
    assert verifier.verify(sign_token(load_signing_key(path), "a", "*", [], ttl_s=60)).subject == "a"


def test_a_token_file_is_read_again_and_survives_its_loss(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "own.token"
    token = TokenFile(path, clock=clock)
    with pytest.raises(Unauthenticated, match="own token"):
        token()
    path.write_text("one\n")
    assert token() == "one"
    replacement = tmp_path / "new"
    replacement.write_text("two\n")
    replacement.replace(path)
    assert token() == "one"
    clock.now += 2
    assert token() == "two"
    path.unlink()
    clock.now += 2
    assert token() == "two"


class CountingEngine:
    """Says what it is told to and counts how often it was asked."""

    def __init__(self) -> None:
        self.answer, self.asked = Decision(allow=True), 0

    def decide(self, caller: Caller, permission: str, tenant: str) -> Decision:
        self.asked += 1
        return self.answer


def test_decisions_are_remembered_for_a_short_time(identities: Identities, clock: Clock) -> None:
    engine = CountingEngine()
    authorizer = Authorizer(TokenVerifier(identities.keys_file), engine, decision_ttl_s=5, clock=clock)
    caller = Caller("a", "demo", ("channel",))
    for _again in range(3):
        authorizer.authorize(caller, "turns.read", "demo")
    assert engine.asked == 1
    authorizer.authorize(caller, "turns.read", "other")
    assert engine.asked == 2
    engine.answer = Decision(allow=False, reasons=("permission_missing",))
    clock.now += 6
    with pytest.raises(PermissionDenied) as denied:
        authorizer.authorize(caller, "turns.read", "demo")
    assert denied.value.metadata["policy_reasons"] == "permission_missing"


@pytest.mark.parametrize("value", [None, "", "Basic abc", "Bearer", "bearer "])
def test_only_bearer_tokens_are_taken(identities: Identities, value: str | None) -> None:
    with pytest.raises(Unauthenticated, match="Bearer"):
        identities.authorizer().authenticate(value)
