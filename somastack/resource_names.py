"""Names of sessions, turns, agents and tenants as people type them, and as the tables show them.

    session   SESSION                  of agent `assistant` on channel `cli`, as `somastack chat` talks by default
              AGENT/CHANNEL/SESSION    of the tenant that --tenant names
    turn      SESSION/TURN             SESSION in any of its forms, TURN as 32 hex digits
              TURN                     with --session SESSION
    agent     AGENT                    of the tenant that --tenant names
    tenant    TENANT

Instead of each the whole resource name may be given, which says its tenant itself. A name of no such form is wrong
usage (exit code 2).
"""

from typing import Final

import typer

from soma_common.ids import InvalidName, SessionName, TurnName, is_session, is_slug
from somastack.demo import AGENT, TENANT

CHANNEL: Final = "cli"
"""The channel of `somastack chat`."""
ROOT: Final = "tenants/"


def session_named(given: str, tenant: str) -> SessionName:
    """The session that `given` names.

    Raises:
        BadParameter: it names none.
    """
    try:
        if given.startswith(ROOT):
            return SessionName.parse(given)
    except InvalidName as error:
        raise typer.BadParameter(str(error), param_hint="SESSION") from error
    match given.split("/"):
        case [session] if is_session(session):
            return SessionName(_tenant(tenant), AGENT, CHANNEL, session)
        case [agent, channel, session] if is_slug(agent) and is_slug(channel) and is_session(session):
            return SessionName(_tenant(tenant), agent, channel, session)
    raise typer.BadParameter(
        f"{given!r} is not SESSION, AGENT/CHANNEL/SESSION or a session's resource name", param_hint="SESSION"
    )


def turn_named(given: str, session: str | None, tenant: str) -> TurnName:
    """The turn that `given` names; `session` is the one it belongs to, where it does not say so itself.

    Raises:
        BadParameter: it names none.
    """
    try:
        if given.startswith(ROOT):
            return TurnName.parse(given)
        before, _, turn = given.rpartition("/")
        if not before and session is None:
            raise typer.BadParameter("of which session? Add --session, or name it SESSION/TURN", param_hint="TURN")
        return TurnName.parse(f"{session_named(before or session or '', tenant)}/turns/{turn}")
    except InvalidName as error:
        raise typer.BadParameter(f"{given!r} is not SESSION/TURN with 32 hex digits", param_hint="TURN") from error


def agent_named(given: str, tenant: str) -> str:
    """The resource name of the agent that `given` names.

    Raises:
        BadParameter: it names none.
    """
    match given.split("/"):
        case [agent] if is_slug(agent):
            return f"{tenant_named(tenant)}/agents/{agent}"
        case ["tenants", of, "agents", agent] if is_slug(of) and is_slug(agent):
            return given
    raise typer.BadParameter(f"{given!r} is not AGENT or an agent's resource name", param_hint="AGENT")


def tenant_named(given: str) -> str:
    """The resource name of the tenant that `given` names.

    Raises:
        BadParameter: it names none.
    """
    return f"tenants/{_tenant(given.removeprefix(ROOT))}"


def tenant_option(tenant: str) -> tuple[str, ...]:
    """What says the tenant of a name in a command, where it is not the one that is meant without."""
    return () if tenant == TENANT else ("--tenant", tenant)


def short(name: str) -> str:
    """A session's or turn's resource name as the tables show it and the commands take it, without its tenant."""
    if not name.startswith(ROOT):
        return name
    return "/".join(name.split("/")[3::2])


def last(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]


def _tenant(given: str) -> str:
    if not is_slug(given):
        raise typer.BadParameter(f"{given!r} is no tenant's id", param_hint="TENANT")
    return given
