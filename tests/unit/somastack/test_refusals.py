"""Refusals with commands in place of the API's calls."""

from pathlib import Path

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey

from soma_common.errors import NotFound, SomaError
from somastack.home import Home
from somastack.refusals import in_chat, in_commands

NO_TENANT = NotFound(
    ErrorReason.ERROR_REASON_TENANT_NOT_FOUND, "no tenant; ListTenants shows those there are", {"tenant": "acme"}
)
NO_AGENT = NotFound(
    ErrorReason.ERROR_REASON_AGENT_NOT_FOUND,
    "no agent; ListAgents shows those it has",
    {"tenant": "acme", "agent": "helper"},
)
NO_SESSION = NotFound(ErrorReason.ERROR_REASON_SESSION_NOT_FOUND, "no session")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_what_the_control_plane_misses_is_looked_up_by_a_command(home: Home) -> None:
    tenant, agent = str(in_commands(NO_TENANT, home)), str(in_commands(NO_AGENT, home))
    assert tenant.startswith("TENANT_NOT_FOUND: there is no tenant 'acme'; ")
    assert f"somastack tenants list --home {home.path} shows" in tenant
    assert agent.startswith("AGENT_NOT_FOUND: tenant 'acme' has no agent 'helper'; ")
    assert f"somastack agents list --tenant acme --home {home.path} shows" in agent
    assert in_commands(NO_SESSION, home) is NO_SESSION


def test_a_translated_refusal_is_the_same_error_to_a_program(home: Home) -> None:
    refused = in_commands(NO_AGENT, home)
    assert (type(refused), refused.reason, refused.metadata) == (NotFound, NO_AGENT.reason, NO_AGENT.metadata)


@pytest.mark.parametrize("bare", [NO_TENANT, NO_AGENT])
def test_who_has_nobody_to_talk_to_is_told_of_the_demonstration(home: Home, bare: SomaError) -> None:
    said = str(in_chat(NotFound(bare.reason, "does not exist"), home, SessionKey(tenant="demo", agent="assistant")))
    assert f"somastack up --demo --home {home.path}" in said
    assert "--tenant" in said


def test_who_names_another_agent_is_told_where_to_look(home: Home) -> None:
    missing = NotFound(ErrorReason.ERROR_REASON_AGENT_NOT_FOUND, "does not exist")
    said = str(in_chat(missing, home, SessionKey(tenant="demo", agent="nobody")))
    assert "tenant 'demo' has no agent 'nobody'" in said
    assert f"somastack agents list --home {home.path} shows" in said
    assert "--demo" not in said
