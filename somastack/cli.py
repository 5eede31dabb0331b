"""The command `somastack`: reads arguments, calls what does the work, turns failures into a line and an exit code."""

import asyncio
import contextlib
import importlib.metadata
import json
import re
import secrets
import sys
import time
from typing import Annotated, Final, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.tenant_service_pb2 import GetTenantRequest

from soma_common.embedded.process import PartFailed
from soma_common.errors import NotFound, SomaError
from soma_common.ids import SessionName
from somastack.auth_material import AuthMaterial
from somastack.chat import Chat, ask_once, converse, token_for
from somastack.config_commands import agents, tenants
from somastack.control import end_stack, needed_state, running_state
from somastack.control import restart as restart_services
from somastack.demo import AGENT, DEFAULT_MODEL, TENANT, demonstrate
from somastack.doctor import Verdict, diagnose
from somastack.home import AlreadyRunning, Home
from somastack.layout import DEFAULT_BASE, Layout
from somastack.next_steps import LOOK_S, has_demo, next_steps
from somastack.remote import Remote
from somastack.resource_names import CHANNEL
from somastack.serve import replicas_from, serve, start_detached, until_ready
from somastack.session_commands import sessions
from somastack.state import StackState
from somastack.status import as_json, as_lines, exit_code
from somastack.story import POLL_S, SUPERVISOR, Line, Story, Tail, sources, worth_telling
from somastack.supervisor import StackOptions, Supervisor
from somastack.terminal import HomeOption, OutputOption, console, errors, read_line, render_line
from somastack.turn_commands import turns
from somastack.waiting import what_holds

MODEL: Final = re.compile(r"[a-z0-9-]+/[A-Za-z0-9._:@/-]{1,200}")
"""As the contract has it (`soma.controlplane.v1.AgentSpec.model`)."""

app = typer.Typer(
    name="somastack",
    help="Run the whole of SomaStack on this machine, and talk to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (sessions, turns, agents, tenants):
    app.add_typer(commands)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"somastack {importlib.metadata.version('somastack')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What all commands share."""


def _model(given: str | None) -> str | None:
    if given is not None and not MODEL.fullmatch(given):
        raise typer.BadParameter(f"{given!r} is not provider/name, such as openai/gpt-4o")
    return given


@app.command()
def up(
    home: HomeOption = None,
    port_base: Annotated[int, typer.Option(help="First port; each part has a fixed place.")] = DEFAULT_BASE,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when all is ready; `down` stops it.")] = False,
    demo: Annotated[
        bool, typer.Option("--demo/--no-demo", help="Make tenant `demo` with agent `assistant`, play a conversation.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            callback=_model,
            help="Model of the demo agent, such as openai/NAME; wants --demo.",
            show_default=f"the one it has, {DEFAULT_MODEL} when it is made",
        ),
    ] = None,
    replicas: Annotated[
        list[str] | None,
        typer.Option(help="Several of a service: --replicas router=2,gateway=2.", show_default="1 each"),
    ] = None,
) -> None:
    """Start NATS, PostgreSQL and the five services; Ctrl-C stops them."""
    if model is not None and not demo:
        raise typer.BadParameter(
            "it is the model of the demonstration's agent: add --demo, or give an agent of your own its model "
            "(docs/guides/admin.md)",
            param_hint="--model",
        )
    options = StackOptions(Home.chosen(home), Layout(port_base, replicas_from(replicas or [])))
    try:
        if detach:
            _up_detached(options, model, demo=demo)
        else:
            _up_here(options, model, demo=demo)
    except AlreadyRunning:
        state = running_state(options.home)
        if state is not None:
            asyncio.run(_tell_next_steps(options.home, state, on=errors))
        raise


@app.command()
def down(home: HomeOption = None) -> None:
    """Stop the stack that runs in the home."""
    chosen = Home.chosen(home)
    began = time.monotonic()
    if asyncio.run(end_stack(chosen)):
        console.print(f"stopped {chosen.path} in {time.monotonic() - began:.1f} s")
    else:
        console.print(f"nothing is running in {chosen.path}")


@app.command()
def restart(
    component: Annotated[
        str | None, typer.Argument(help="For example router, router-0.", show_default="every service")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Restart services one after the other, each when the one before is ready again.

    With several of a service (`up --replicas`) nobody outside notices. New code on the disk is then what runs.
    """
    chosen = Home.chosen(home)
    asyncio.run(restart_services(chosen, component, lambda name, took_s: console.print(f"{name} in {took_s:.1f} s")))


@app.command()
def status(
    home: HomeOption = None,
    output: OutputOption = "table",
) -> None:
    """Show every component: pid, state, since when, restarts, addresses.

    Exit code 0: all is ready; 1: something is not; 3: nothing runs.
    """
    chosen = Home.chosen(home)
    state = running_state(chosen)
    if output == "json":
        console.print(json.dumps(as_json(chosen, state), indent=2), markup=False)
    elif state is None:
        console.print(f"nothing is running in {chosen.path}; start it: {chosen.command('up', '--demo')}")
    else:
        console.print(f"{chosen.path}: {state.phase} since {state.since}, supervisor {state.supervisor.pid}")
        for line in as_lines(state):
            console.print(line)
    raise typer.Exit(exit_code(state))


@app.command()
def logs(
    component: Annotated[
        str | None, typer.Argument(help="For example router, router-0, nats, postgres, supervisor.", show_default="all")
    ] = None,
    home: HomeOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Show so many of the last lines.")] = 100,
) -> None:
    """Show what the components logged, in one story."""
    chosen = Home.chosen(home)
    if not any(path.is_file() for path in chosen.logs.glob("*.log")):
        raise PartFailed(f"nothing has logged anything in {chosen.path}", f"start it: {chosen.command('up', '--demo')}")
    tails = [Tail(source, from_start=True) for source in sources(chosen, _logged_by(chosen, component))]
    past = sorted((line for tail in tails for line in tail.read()), key=lambda line: line.time)
    for line in past[len(past) - min(lines, len(past)) :]:
        console.print(render_line(line))
    if follow:
        story = Story(tails, lambda line: console.print(render_line(line)))
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                story.catch_up()
                time.sleep(POLL_S)


@app.command()
def chat(
    home: HomeOption = None,
    tenant: Annotated[str, typer.Option(help="The tenant.")] = TENANT,
    agent: Annotated[str, typer.Option(help="The agent that answers.")] = AGENT,
    channel: Annotated[str, typer.Option(help="The channel the conversation belongs to.")] = CHANNEL,
    session: Annotated[
        str | None, typer.Option(help="The conversation; name one to go on with it later.", show_default="a new one")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Say only this; print the answer. Exit code 0: answered.")
    ] = None,
    policy: Annotated[
        Literal["enqueue", "accumulate", "steer", "interrupt", "rollback", "reject"] | None,
        typer.Option(help="What a message does while a turn of the conversation runs.", show_default="the agent's"),
    ] = None,
) -> None:
    """Talk with an agent. Ctrl-D ends it; Ctrl-C leaves a message, which is answered all the same."""
    chosen = Home.chosen(home)
    state = needed_state(chosen)
    named = session or f"chat-{secrets.token_hex(4)}"
    key = SessionKey(tenant=tenant, agent=agent, channel=channel, session=named)
    name = SessionName(tenant, agent, channel, named)
    remote = Remote.at(chosen, state)
    arrival = ArrivalPolicy.Value(f"ARRIVAL_POLICY_{(policy or 'unspecified').upper()}")
    talk = Chat(
        state.targets("gateway"),
        token_for(chosen, tenant),
        key,
        chosen,
        console,
        errors,
        quiet=message is not None,
        policy=arrival,
        what_holds=lambda message_id: what_holds(remote, name, message_id, arrival),
    )
    if message is not None:
        raise typer.Exit(0 if ask_once(talk, message) else 1)
    console.print(f"session {named} with {agent} of tenant {tenant}; Ctrl-D ends it", style="dim")
    converse(talk, lambda: read_line(Text("you> ", style="bold green")))


@app.command()
def token(
    tenant: Annotated[str, typer.Argument(help="The tenant whose channels are to connect.")],
    home: HomeOption = None,
) -> None:
    """Make a tenant's token for channel adapters, if it has none, and print its file."""
    chosen = Home.chosen(home)
    console.print(str(AuthMaterial(chosen).issue(tenant)), markup=False)
    state = running_state(chosen)
    if state is not None and asyncio.run(_is_missing(chosen, state, tenant)):
        listing = chosen.command("tenants", "list")
        errors.print(Text(f"! there is no tenant {tenant!r} yet; {listing} shows those there are", style="yellow"))


@app.command()
def doctor(
    home: HomeOption = None,
    port_base: Annotated[int, typer.Option(help="The ports to look at.")] = DEFAULT_BASE,
) -> None:
    """Look at everything a stack needs, and say what to do. Exit code 1: something is bad."""
    findings = asyncio.run(diagnose(Home.chosen(home), Layout(port_base)))
    marks = {Verdict.GOOD: ("✔", "green"), Verdict.DOUBTFUL: ("!", "yellow"), Verdict.BAD: ("✘", "bold red")}
    for finding in findings:
        mark, style = marks[finding.verdict]
        console.print(Text.assemble((f"{mark} {finding.what:<16}", style), finding.seen))
        if finding.advice:
            console.print(Text(f"  {'':<16}→ {finding.advice}", style=style))
    raise typer.Exit(1 if any(finding.verdict is Verdict.BAD for finding in findings) else 0)


def main() -> NoReturn:
    """Run the command; a failure that is no defect of ours is one line that says what to do."""
    try:
        app()
    except PartFailed as failure:
        _tell_failure(failure.message, failure.advice)
    except SomaError as error:
        _tell_failure(str(error), "")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1)


async def _is_missing(home: Home, state: StackState, tenant: str) -> bool:
    """Whether the control plane knows of no such tenant; where it does not say, none is missed."""
    try:
        async with asyncio.timeout(LOOK_S), Remote.at(home, state).tenants() as tenants:
            await tenants.GetTenant(GetTenantRequest(name=f"tenants/{tenant}"))
    except NotFound:
        return True
    except (SomaError, TimeoutError):
        pass
    return False


def _tell_failure(message: str, advice: str) -> None:
    errors.print(Text(f"✘ {message}", style="bold red"))
    if advice:
        errors.print(Text(f"→ {advice}"))


def _up_here(options: StackOptions, model: str | None, *, demo: bool) -> None:
    """Serve in this process; the story of the logs on the console."""
    options.home.make()
    names = [SUPERVISOR, "nats", "postgres", *(instance.name for instance in options.layout.instances())]
    story = Story([Tail(source) for source in sources(options.home, names)], _tell)

    async def when_ready(stack: Supervisor) -> None:
        with story.hold():
            if demo:
                try:
                    await demonstrate(options.home, stack.state, console, model)
                except PartFailed as failure:
                    raise PartFailed(failure.message, f"{failure.advice}; the stack was stopped") from failure
            await _tell_next_steps(options.home, stack.state)
            console.print(f"\nserving from {options.home.path}; Ctrl-C stops it\n", style="bold")

    async def told() -> None:
        telling = asyncio.create_task(story.run())
        try:
            await serve(options, when_ready)
        finally:
            telling.cancel()
            story.catch_up()

    asyncio.run(told())


def _up_detached(options: StackOptions, model: str | None, *, demo: bool) -> None:
    """Start a supervisor of its own and wait until it is ready."""
    home = options.home
    goes_on = f"the stack goes on running ({home.command('down')} stops it)"

    async def started() -> None:
        supervisor = start_detached(options)
        try:
            state = await until_ready(home, supervisor)
        except asyncio.CancelledError:  # Ctrl-C before it was ready.
            supervisor.terminate()
            raise
        if demo:
            try:
                await demonstrate(home, state, console, model)
            except PartFailed as failure:
                raise PartFailed(failure.message, f"{failure.advice}; {goes_on}") from failure
            except asyncio.CancelledError:  # Ctrl-C.
                errors.print(Text(goes_on, style="dim"))
                raise
        await _tell_next_steps(home, state)

    if home.is_owned():
        raise AlreadyRunning(home)
    asyncio.run(started())
    console.print(f"\nserving from {home.path}", style="bold")


async def _tell_next_steps(home: Home, state: StackState, on: Console = console) -> None:
    on.print()
    for line in next_steps(home, state, has_demo=await has_demo(home, state)):
        on.print(line)


def _tell(line: Line) -> None:
    # Why `up` fails is its own last line; the log has it for those who look later.
    if worth_telling(line) and line.event != "stack.failed":
        console.print(render_line(line))


def _logged_by(home: Home, component: str | None) -> list[str]:
    """The parts whose logs are meant by `component`: one part, all replicas of a service, or everything.

    Raises:
        PartFailed: nothing of that name has logged anything here.
    """
    instances = sorted(path.stem for path in home.logs.glob("*.log") if path.stem != SUPERVISOR)
    everything = [SUPERVISOR, "nats", "postgres", *instances]
    chosen = [name for name in everything if component in (None, name, name.rpartition("-")[0])]
    if not chosen:
        raise PartFailed(f"there is no log of {component} in {home.path}", "name one of " + ", ".join(everything))
    return chosen


if __name__ == "__main__":
    main()
