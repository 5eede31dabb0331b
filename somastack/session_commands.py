"""`somastack sessions`: look at conversations, watch them, hold them, stop what they do."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Literal

import grpc
import typer
from rich.text import Text
from soma.router.v1.session_service_pb2 import (
    CancelSessionRequest,
    GetSessionRequest,
    InterruptSessionRequest,
    ListMessagesRequest,
    ListSessionsRequest,
    PauseSessionRequest,
    ResumeSessionRequest,
    Session,
    SessionMessage,
    SessionState,
    WatchSessionRequest,
    WatchSessionResponse,
)

from soma_common.ids import SessionName
from somastack.demo import TENANT
from somastack.remote import Remote, every, first, request_id, run
from somastack.resource_names import last, session_named, short, tenant_named
from somastack.tables import (
    NOTHING,
    as_block,
    as_table,
    at,
    lasting,
    one_line,
    print_json,
    print_json_line,
    since,
)
from somastack.terminal import (
    HomeOption,
    LimitOption,
    Output,
    OutputOption,
    RequestIdOption,
    TenantOption,
    console,
    errors,
)
from somastack.turn_view import outcome_name, policy_name, text_of
from somastack.watch import SessionView, followed, until

if TYPE_CHECKING:
    from soma.router.v1.session_service_pb2_grpc import SessionServiceAsyncStub

PAGE_SIZE = 200
SESSION_COLUMNS = ("session", "state", "queue", "age", "running turn", "turns", "undelivered", "changed")
MESSAGE_COLUMNS = ("message", "policy", "queue", "age", "turn", "outcome", "said")

sessions = typer.Typer(
    name="sessions", help="Look at conversations; hold them, stop what they do.", no_args_is_help=True
)

SessionArgument = Annotated[
    str,
    typer.Argument(
        metavar="SESSION",
        help="As `sessions list` shows it (AGENT/CHANNEL/SESSION), the last part alone of a `somastack chat`, "
        "or the whole resource name.",
    ),
]


@sessions.command("list")
def list_sessions(
    agent: Annotated[str | None, typer.Option(help="Only of this agent.", show_default="all")] = None,
    channel: Annotated[str | None, typer.Option(help="Only of this channel of it.", show_default="all")] = None,
    state: Annotated[Literal["idle", "busy"] | None, typer.Option(help="Only those.", show_default="all")] = None,
    limit: LimitOption = 50,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """List sessions: what they do, how many messages wait and since when, which turn runs."""
    if channel is not None and agent is None:
        raise typer.BadParameter("a channel belongs to an agent: add --agent", param_hint="--channel")
    within = (f"/agents/{agent}" if agent else "") + (f"/channels/{channel}" if channel else "")
    wanted = ListSessionsRequest(
        parent=tenant_named(tenant) + within,
        page_size=min(limit, PAGE_SIZE),
        state=SessionState.Value(f"SESSION_STATE_{state.upper()}") if state else SessionState.SESSION_STATE_UNSPECIFIED,
    )
    remote = Remote.of(home)

    async def listed() -> None:
        async with remote.sessions(last(tenant_named(tenant))) as service:
            found = await first(limit, every(service.ListSessions, wanted, lambda page: page.sessions))
        if output == "json":
            print_json({"sessions": found})
        else:
            for line in as_table(SESSION_COLUMNS, [_row(session) for session in found]):
                console.print(line)

    run(listed())


@sessions.command("get")
def get_session(
    session: SessionArgument,
    messages: Annotated[bool, typer.Option("--messages", "-m", help="Also list its messages.")] = False,
    waiting: Annotated[bool, typer.Option("--waiting", "-w", help="Also list the messages that wait.")] = False,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Show a session, and with --messages or --waiting what was said: place in the queue, age, turn, outcome."""
    name, remote = session_named(session, tenant), Remote.of(home)

    async def got() -> None:
        said: list[SessionMessage] = []
        async with remote.sessions(name.tenant) as service:
            found = (await service.GetSession(GetSessionRequest(name=str(name)))).session
            if messages or waiting:
                wanted = ListMessagesRequest(parent=str(name), page_size=PAGE_SIZE)
                listed = every(service.ListMessages, wanted, lambda page: page.messages)
                said = [message async for message in listed if messages or message.queue_position]
        if output == "json":
            print_json({"session": found, "messages": said} if messages or waiting else found)
            return
        for line in as_block(_lines(found)):
            console.print(line)
        if messages or waiting:
            console.print()
            for line in as_table(MESSAGE_COLUMNS, [_message_row(message) for message in said]):
                console.print(line)

    run(got())


@sessions.command("watch")
def watch_session(
    session: SessionArgument, tenant: TenantOption = TENANT, output: OutputOption = "table", home: HomeOption = None
) -> None:
    """Show what runs in a session and everything that follows, until Ctrl-C. As JSON: an event a line."""
    name, remote = session_named(session, tenant), Remote.of(home)
    view = SessionView(console)

    def shown(told: WatchSessionResponse) -> bool:
        if output == "json":
            print_json_line(told)
        else:
            view.show(told.event)
        return False

    async def watched() -> None:
        async with remote.sessions(name.tenant) as service:
            await _tell_if_missing(service, name)
            await until(
                followed(lambda at: service.WatchSession(WatchSessionRequest(name=str(name), resume_from=at))), shown
            )

    with contextlib.suppress(KeyboardInterrupt):
        run(watched())


@sessions.command("pause")
def pause_session(
    session: SessionArgument,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Begin no more turns of a session: what runs ends, messages are accepted and wait."""
    name, remote = session_named(session, tenant), Remote.of(home)
    wanted = PauseSessionRequest(name=str(name), request_id=request_id(request))

    async def paused() -> Session:
        async with remote.sessions(name.tenant) as service:
            return (await service.PauseSession(wanted)).session

    _tell(run(paused()), output)


@sessions.command("resume")
def resume_session(
    session: SessionArgument,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """End the pause of a session: what waits begins."""
    name, remote = session_named(session, tenant), Remote.of(home)
    wanted = ResumeSessionRequest(name=str(name), request_id=request_id(request))

    async def resumed() -> Session:
        async with remote.sessions(name.tenant) as service:
            return (await service.ResumeSession(wanted)).session

    _tell(run(resumed()), output)


@sessions.command("interrupt")
def interrupt_session(
    session: SessionArgument,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Stop the turn that runs in a session and keep what it has done: what comes next goes on from there."""
    name, remote = session_named(session, tenant), Remote.of(home)
    wanted = InterruptSessionRequest(name=str(name), request_id=request_id(request))

    async def interrupted() -> Session:
        async with remote.sessions(name.tenant) as service:
            return (await service.InterruptSession(wanted)).session

    _tell(run(interrupted()), output)


@sessions.command("cancel")
def cancel_session(
    session: SessionArgument,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Stop the turn that runs in a session and end every message that waits."""
    name, remote = session_named(session, tenant), Remote.of(home)
    wanted = CancelSessionRequest(name=str(name), request_id=request_id(request))

    async def cancelled() -> Session:
        async with remote.sessions(name.tenant) as service:
            return (await service.CancelSession(wanted)).session

    _tell(run(cancelled()), output)


async def _tell_if_missing(service: "SessionServiceAsyncStub", name: SessionName) -> None:
    """Say that a watch waits for a session that is not there yet; other refusals are the watch's own."""
    try:
        await service.GetSession(GetSessionRequest(name=str(name)))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            missing = f"there is no session {short(str(name))} yet: waiting for its first message"
            errors.print(Text(missing, style="dim"))


def _tell(session: Session, output: Output) -> None:
    if output == "json":
        print_json(session)
    else:
        for line in as_table(SESSION_COLUMNS, [_row(session)]):
            console.print(line)


def _row(session: Session) -> list[str]:
    """A session in the columns of SESSION_COLUMNS."""
    return [
        short(session.name),
        _state(session),
        str(session.queued_count),
        since(session.oldest_queued_time),
        last(session.running_turn) or NOTHING,
        str(session.turn_count),
        str(session.undelivered_count),
        since(session.update_time),
    ]


def _lines(session: Session) -> list[tuple[str, str]]:
    """A session value by value."""
    return [
        ("session", session.name),
        ("state", _state(session)),
        ("queue", str(session.queued_count)),
        ("oldest waits", since(session.oldest_queued_time)),
        ("running turn", last(session.running_turn)),
        ("messages", str(session.message_count)),
        ("turns", str(session.turn_count)),
        ("undelivered", str(session.undelivered_count)),
        ("began", at(session.create_time)),
        ("changed", at(session.update_time)),
    ]


def _state(session: Session) -> str:
    """For example `busy`, or `idle, paused`."""
    state = SessionState.Name(session.state).removeprefix("SESSION_STATE_").lower()
    return f"{state}, paused" if session.paused else state


def _message_row(message: SessionMessage) -> list[str]:
    """A message in the columns of MESSAGE_COLUMNS."""
    waits = message.queue_position > 0
    return [
        message.message_id,
        policy_name(message.policy) if message.policy else NOTHING,
        str(message.queue_position) if waits else NOTHING,
        lasting(message.queue_age_ms) if waits else since(message.accept_time),
        last(message.turn) or NOTHING,
        outcome_name(message.outcome) if message.outcome else NOTHING,
        one_line(text_of(message.message)),
    ]
