"""Refusals as the command line says them: services name the calls of their API, a person has commands."""

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey

from soma_common.errors import SomaError
from somastack.demo import AGENT, TENANT
from somastack.home import Home
from somastack.resource_names import tenant_option


def in_commands(error: SomaError, home: Home) -> SomaError:
    """A refusal of the control plane with the commands that show what there is."""
    return _missing(error, home, error.metadata.get("tenant", ""), error.metadata.get("agent", ""))


def in_chat(error: SomaError, home: Home, session: SessionKey) -> SomaError:
    """A refusal of the gateway with what a person can do who wants to talk."""
    gone = error.reason in (ErrorReason.ERROR_REASON_TENANT_NOT_FOUND, ErrorReason.ERROR_REASON_AGENT_NOT_FOUND)
    if gone and (session.tenant, session.agent) == (TENANT, AGENT):
        missing = f"there is no agent {AGENT} of tenant {TENANT} here"
        again = f"{home.command('down')}, then {home.command('up', '--demo')}"
        return _saying(error, f"{missing}: start with --demo ({again}), or name another with --tenant and --agent")
    return _missing(error, home, session.tenant, session.agent)


def _missing(error: SomaError, home: Home, tenant: str, agent: str) -> SomaError:
    match error.reason:
        case ErrorReason.ERROR_REASON_TENANT_NOT_FOUND:
            listing = home.command("tenants", "list")
            return _saying(error, f"there is no tenant {tenant!r}; {listing} shows those there are")
        case ErrorReason.ERROR_REASON_AGENT_NOT_FOUND:
            listing = home.command("agents", "list", *tenant_option(tenant))
            return _saying(error, f"tenant {tenant!r} has no agent {agent!r}; {listing} shows those it has")
        case _:
            return error


def _saying(error: SomaError, message: str) -> SomaError:
    return type(error)(error.reason, message, error.metadata, error.retry_delay_s, error.field_violations)
