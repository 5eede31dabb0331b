"""The policy allows what it should and denies with the exact reason (soma_common/authz/policy/authz.rego)."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from soma_common.authz.engine import POLICY_ERROR, Decision, RegoEngine, default_engine
from soma_common.authz.tokens import Caller

ADMIN = Caller("alice", "*", ("admin",))
SERVICE = Caller("router", "*", ("service",))
CHANNEL = Caller("adapter", "demo", ("channel",))
TENANT_ADMIN = Caller("bob", "demo", ("admin",))
NOBODY = Caller("eve", "demo", ())

MISSING, MISMATCH, ALL_REQUIRED = "permission_missing", "tenant_mismatch", "all_tenants_required"


@pytest.fixture(scope="module")
def engine() -> RegoEngine:
    return default_engine()


@pytest.mark.parametrize(
    ("caller", "permission", "tenant"),
    [
        (ADMIN, "tenants.create", ""),
        (ADMIN, "turns.read", "demo"),
        (SERVICE, "turns.run", ""),
        (SERVICE, "config.watch", ""),
        (SERVICE, "tools.invoke", "other"),
        (TENANT_ADMIN, "agents.create", "demo"),
        (Caller("x", "demo", ("unheard-of", "channel")), "turns.read", "demo"),
        *(
            (CHANNEL, permission, "demo")
            for permission in (
                "messages.send",
                "sessions.read",
                "turns.read",
                "turns.cancel",
                "tools.read",
                "agents.read",
                "tenants.read",
            )
        ),
    ],
)
def test_allowed(engine: RegoEngine, caller: Caller, permission: str, tenant: str) -> None:
    assert engine.decide(caller, permission, tenant) == Decision(allow=True, reasons=())


@pytest.mark.parametrize(
    ("caller", "permission", "tenant", "reasons"),
    [
        (CHANNEL, "messages.send", "other", (MISMATCH,)),
        (CHANNEL, "turns.run", "demo", (MISSING,)),
        (CHANNEL, "turns.run", "", (ALL_REQUIRED, MISSING)),
        (CHANNEL, "tools.invoke", "demo", (MISSING,)),
        (CHANNEL, "agents.create", "demo", (MISSING,)),
        (CHANNEL, "messages.send", "", (ALL_REQUIRED,)),
        (CHANNEL, "tenants.list", "", (ALL_REQUIRED, MISSING)),
        (CHANNEL, "*", "demo", (MISSING,)),
        (CHANNEL, "", "demo", (MISSING,)),
        (CHANNEL, "messages.send", "*", (MISMATCH,)),
        (TENANT_ADMIN, "tenants.create", "", (ALL_REQUIRED,)),
        (TENANT_ADMIN, "turns.read", "other", (MISMATCH,)),
        (NOBODY, "turns.read", "demo", (MISSING,)),
        (NOBODY, "turns.read", "other", (MISSING, MISMATCH)),
        (Caller("x", "", ("admin",)), "tenants.create", "", (ALL_REQUIRED,)),
        (Caller("x", "demo", ("Admin", "admin ", 'a"dmin', "\\")), "turns.read", "demo", (MISSING,)),
        (Caller('"}], "allow": true', "demo", ()), 'turns.read"', "demo", (MISSING,)),
    ],
)
def test_denied_with_the_exact_reason(
    engine: RegoEngine, caller: Caller, permission: str, tenant: str, reasons: tuple[str, ...]
) -> None:
    assert engine.decide(caller, permission, tenant) == Decision(allow=False, reasons=tuple(sorted(reasons)))


@pytest.mark.parametrize(
    "rule",
    [
        "decision := {}",
        'decision := {"allow": "true", "reasons": []}',
        'decision := {"allow": 1, "reasons": []}',
        "decision := true",
        'decision := {"allow": true, "reasons": []} if input.subject.id == "never"',
        'decision := {"allow": data.nothing.here, "reasons": []}',
    ],
)
def test_anything_but_a_clear_yes_is_a_no(rule: str) -> None:
    engine = RegoEngine(f"package soma.authz\nimport rego.v1\n{rule}\n", {})
    assert not engine.decide(ADMIN, "turns.read", "demo").allow


def test_a_policy_that_fails_denies_and_says_so() -> None:
    engine = RegoEngine("package soma.authz\nimport rego.v1\ndecision := no_such_builtin(input)\n", {})
    assert engine.decide(ADMIN, "turns.read", "demo") == Decision(allow=False, reasons=(POLICY_ERROR,))


def test_a_policy_that_does_not_compile_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="policy"):
        RegoEngine("package soma.authz\ndecision := {", {})


def test_threads_do_not_mix_their_answers(engine: RegoEngine) -> None:
    def ask(number: int) -> bool:
        tenant = "demo" if number % 2 else "other"
        return engine.decide(CHANNEL, "turns.read", tenant).allow is (tenant == "demo")

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(200)))
