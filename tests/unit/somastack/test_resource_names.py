"""Names as people type them."""

import pytest
import typer

from soma_common.ids import SessionName, TurnName
from somastack.resource_names import agent_named, last, session_named, short, tenant_named, turn_named

SESSION = "tenants/acme/agents/helper/channels/web/sessions/a.b@c"
HEX = "0123456789abcdef" * 2
CHAT = SessionName("acme", "assistant", "cli", "chat-1")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("chat-1", CHAT),
        ("helper/web/a.b@c", SessionName.parse(SESSION)),
        (SESSION, SessionName.parse(SESSION)),
        (SESSION.replace("acme", "other"), SessionName("other", "helper", "web", "a.b@c")),
    ],
)
def test_sessions(given: str, meant: SessionName) -> None:
    assert session_named(given, "acme") == meant


@pytest.mark.parametrize(
    "given", ["", "a b", "web/a", "a/b/c/d", "Helper/web/x", "tenants/acme", f"{SESSION}/turns/{HEX}"]
)
def test_what_names_no_session_is_wrong_usage(given: str) -> None:
    with pytest.raises(typer.BadParameter):
        session_named(given, "acme")


def test_a_tenant_that_cannot_be_is_wrong_usage_and_reaches_no_file() -> None:
    for tenant in ("../admin", "", "Demo", "a/b"):
        with pytest.raises(typer.BadParameter):
            session_named("chat-1", tenant)
        with pytest.raises(typer.BadParameter):
            tenant_named(tenant)
        with pytest.raises(typer.BadParameter):
            agent_named("helper", tenant)


@pytest.mark.parametrize(
    ("given", "session", "meant"),
    [
        (f"chat-1/{HEX}", None, CHAT),
        (HEX, "chat-1", CHAT),
        (HEX, SESSION, SessionName.parse(SESSION)),
        (f"helper/web/a.b@c/{HEX}", None, SessionName.parse(SESSION)),
        (f"{SESSION}/turns/{HEX}", "chat-1", SessionName.parse(SESSION)),
    ],
)
def test_turns(given: str, session: str | None, meant: SessionName) -> None:
    assert turn_named(given, session, "acme") == TurnName(meant, bytes.fromhex(HEX))


@pytest.mark.parametrize("given", [HEX, "chat-1/12", f"chat-1/{HEX.upper()}", SESSION, f"a b/{HEX}", ""])
def test_what_names_no_turn_is_wrong_usage(given: str) -> None:
    with pytest.raises(typer.BadParameter):
        turn_named(given, None, "acme")


def test_agents_and_tenants() -> None:
    assert agent_named("helper", "acme") == agent_named("tenants/acme/agents/helper", "demo")
    assert tenant_named("acme") == tenant_named("tenants/acme") == "tenants/acme"
    with pytest.raises(typer.BadParameter):
        agent_named("acme/helper", "demo")


def test_what_the_tables_show_can_be_typed() -> None:
    turn = f"{SESSION}/turns/{HEX}"
    assert str(session_named(short(SESSION), "acme")) == SESSION
    assert str(turn_named(short(turn), None, "acme")) == turn
    assert short("") == ""
    assert last(turn) == HEX
