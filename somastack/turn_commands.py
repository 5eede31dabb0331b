"""`somastack turns`: look at turns and their journals, watch them, stop them and let them go on."""

import contextlib
from typing import Annotated, Literal

import typer
from soma.router.v1.turn_service_pb2 import (
    CancelTurnRequest,
    GetTurnRequest,
    InterruptTurnRequest,
    ListStepsRequest,
    ListTurnsRequest,
    ResumeTurnRequest,
    TurnStatus,
    WatchTurnRequest,
    WatchTurnResponse,
)

from soma_common.ids import TurnName
from somastack.demo import TENANT
from somastack.journal import TURN_COLUMNS, step_lines, turn_lines, turn_row
from somastack.remote import Remote, every, first, newest, request_id, run
from somastack.resource_names import last, session_named, short, tenant_named, turn_named
from somastack.tables import as_block, as_table, print_json, print_json_line
from somastack.terminal import (
    HomeOption,
    LimitOption,
    OutputOption,
    RequestIdOption,
    TenantOption,
    console,
)
from somastack.turn_view import TurnView
from somastack.watch import followed, until

PAGE_SIZE = 200

turns = typer.Typer(name="turns", help="Look at turns and their journals; stop them.", no_args_is_help=True)

TurnArgument = Annotated[
    str,
    typer.Argument(
        metavar="TURN", help="As `turns list` shows it (AGENT/CHANNEL/SESSION/TURN), or the whole resource name."
    ),
]
SessionOption = Annotated[
    str | None, typer.Option(metavar="SESSION", help="The session of a turn that is named by its hex digits alone.")
]


@turns.command("list")
def list_turns(
    session: Annotated[
        str | None, typer.Option(metavar="SESSION", help="Only of this session.", show_default="of the whole tenant")
    ] = None,
    status: Annotated[
        Literal["running", "converging", "ended"] | None, typer.Option(help="Only those.", show_default="all")
    ] = None,
    limit: LimitOption = 50,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """List turns: those of a tenant from the newest on, or the newest of a session in their order."""
    named = session_named(session, tenant) if session is not None else None
    parent, of = (str(named), named.tenant) if named is not None else (tenant_named(tenant), last(tenant_named(tenant)))
    wanted = ListTurnsRequest(
        parent=parent,
        page_size=min(limit, PAGE_SIZE) if named is None else PAGE_SIZE,
        status=TurnStatus.Value(f"TURN_STATUS_{status.upper()}") if status else TurnStatus.TURN_STATUS_UNSPECIFIED,
    )
    remote = Remote.of(home)

    async def listed() -> None:
        async with remote.turns(of) as service:
            listing = every(service.ListTurns, wanted, lambda page: page.turns)
            found = await (first(limit, listing) if named is None else newest(limit, listing))
        if output == "json":
            print_json({"turns": found})
        else:
            for line in as_table(TURN_COLUMNS, [turn_row(turn) for turn in found]):
                console.print(line)

    run(listed())


@turns.command("get")
def get_turn(
    turn: TurnArgument,
    session: SessionOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Show a turn: whether it runs, how it ended, its answer."""
    name, remote = turn_named(turn, session, tenant), Remote.of(home)

    async def got() -> None:
        async with remote.turns(name.session.tenant) as service:
            found = (await service.GetTurn(GetTurnRequest(name=str(name)))).turn
        if output == "json":
            print_json(found)
        else:
            for line in as_block(turn_lines(found)):
                console.print(line)

    run(got())


@turns.command("steps")
def list_steps(
    turn: TurnArgument,
    session: SessionOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Show a turn's journal: what the model said and called, and what the tools answered."""
    name, remote = turn_named(turn, session, tenant), Remote.of(home)

    async def listed() -> None:
        wanted = ListStepsRequest(parent=str(name), page_size=PAGE_SIZE)
        async with remote.turns(name.session.tenant) as service:
            found = [step async for step in every(service.ListSteps, wanted, lambda page: page.steps)]
        if output == "json":
            print_json({"steps": found})
        else:
            for line in (line for step in found for line in step_lines(step)):
                console.print(line)

    run(listed())


@turns.command("watch")
def watch_turn(
    turn: TurnArgument,
    session: SessionOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Show a turn from its beginning and as it goes on, to its end. Ctrl-C leaves it; the turn goes on.

    As JSON: an event a line.
    """
    name, remote = turn_named(turn, session, tenant), Remote.of(home)
    view = TurnView(console, name.session.agent)

    def shown(told: WatchTurnResponse) -> bool:
        ended = told.event.WhichOneof("event") == "ended"
        if output == "json":
            print_json_line(told)
        elif ended:
            view.finish(told.event.ended)
        else:
            view.show(told.event)
        return ended

    async def watched() -> None:
        async with remote.turns(name.session.tenant) as service:
            await until(followed(lambda at: service.WatchTurn(WatchTurnRequest(name=str(name), resume_from=at))), shown)

    with contextlib.suppress(KeyboardInterrupt):
        run(watched())


@turns.command("cancel")
def cancel_turn(
    turn: TurnArgument,
    session: SessionOption = None,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Stop a turn; its messages are done with. One that has ended stays as it is."""
    _stop("cancel", turn_named(turn, session, tenant), request, output, Remote.of(home))


@turns.command("interrupt")
def interrupt_turn(
    turn: TurnArgument,
    session: SessionOption = None,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Stop a turn and keep what it has done: what comes next goes on from there. One that has ended stays as it is."""
    _stop("interrupt", turn_named(turn, session, tenant), request, output, Remote.of(home))


@turns.command("resume")
def resume_turn(
    turn: TurnArgument,
    session: SessionOption = None,
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Ask the agent to go on where an interrupted, cancelled or failed turn ended: a new turn of the session."""
    name, remote = turn_named(turn, session, tenant), Remote.of(home)

    async def resumed() -> None:
        async with remote.turns(name.session.tenant) as service:
            answer = await service.ResumeTurn(ResumeTurnRequest(name=str(name), request_id=request_id(request)))
        if output == "json":
            print_json(answer)
        else:
            for line in as_block([("message", answer.message_id), ("turn", short(answer.turn_name))]):
                console.print(line)

    run(resumed())


def _stop(verb: Literal["cancel", "interrupt"], name: TurnName, given: str | None, output: str, remote: Remote) -> None:
    async def stopped() -> None:
        async with remote.turns(name.session.tenant) as service:
            if verb == "cancel":
                cancel = CancelTurnRequest(name=str(name), request_id=request_id(given))
                turn = (await service.CancelTurn(cancel)).turn
            else:
                interrupt = InterruptTurnRequest(name=str(name), request_id=request_id(given))
                turn = (await service.InterruptTurn(interrupt)).turn
        if output == "json":
            print_json(turn)
        else:
            for line in as_table(TURN_COLUMNS, [turn_row(turn)]):
                console.print(line)

    run(stopped())
