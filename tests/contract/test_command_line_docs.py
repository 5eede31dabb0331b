"""The commands and calls that the documentation shows exist: their options parse, their requests fit the contract."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1 import agent_service_pb2, config_service_pb2, tenant_service_pb2
from soma.router.v1 import session_service_pb2, turn_service_pb2

from somastack.cli import app

ROOT = Path(__file__).parents[2]
SERVED = [
    agent_service_pb2.DESCRIPTOR,
    config_service_pb2.DESCRIPTOR,
    tenant_service_pb2.DESCRIPTOR,
    session_service_pb2.DESCRIPTOR,
    turn_service_pb2.DESCRIPTOR,
]
"""Imported for what they register."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^\$ (?:\S+=\S+ )*(?:\.venv/bin/)?somastack (.+?)(?:  +#.*)?$", re.MULTILINE)
ASK = re.compile(r"^\$ ask (\w+)/(\w+) '(.+)'$", re.MULTILINE)
VERBS = re.compile(r"^(Pause|Resume|Interrupt|Cancel)")


def commands() -> list[list[str]]:
    found = (line for page in PAGES for line in COMMAND.findall(page.read_text(encoding="utf-8")))
    return [shlex.split(line) for line in found]


def leaves(group: "typer.core.TyperGroup", before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from leaves(command, (*before, name))
        else:
            yield (*before, name)


def parse(arguments: list[str]) -> None:
    """Read a command's arguments as the program does, and run nothing."""
    command = typer.main.get_command(app)
    rest, context = arguments, None
    while isinstance(command, typer.core.TyperGroup):
        context = command.make_context(command.name, [], parent=context, resilient_parsing=True)
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
    if "--help" not in rest:
        command.make_context(command.name, list(rest), parent=context)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_a_shown_command_parses(arguments: list[str]) -> None:
    parse(arguments)


def test_every_command_that_controls_is_shown() -> None:
    shown = {tuple(arguments[:2]) for arguments in commands()}
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert {leaf for leaf in leaves(group) if len(leaf) == 2} <= shown


def asked() -> list[tuple[str, str, str]]:
    page = (ROOT / "docs" / "guides" / "admin.md").read_text(encoding="utf-8")
    return [
        (service, method, request.replace("'$SESSION'", "s").replace("'$TURN'", "t"))
        for service, method, request in ASK.findall(page)
    ]


@pytest.mark.parametrize(("service", "method", "request_json"), asked())
def test_a_shown_call_fits_the_contract(service: str, method: str, request_json: str) -> None:
    found = descriptor_pool.Default().FindServiceByName(f"soma.router.v1.{service}").methods_by_name[method]
    json_format.ParseDict(json.loads(request_json), GetMessageClass(found.input_type)())


def test_every_verb_of_the_contract_is_shown_as_a_call() -> None:
    page = (ROOT / "docs" / "guides" / "admin.md").read_text(encoding="utf-8")
    verbs = [
        f"{service.name}/{method.name}"
        for file in SERVED
        for service in file.services_by_name.values()
        for method in service.methods
        if VERBS.match(method.name)
    ]
    assert len(verbs) >= 10
    assert [verb for verb in verbs if verb not in page] == []


@pytest.mark.parametrize("policy", [name.removeprefix("ARRIVAL_POLICY_") for name in ArrivalPolicy.keys()[1:]])
def test_chat_offers_every_policy_of_the_contract(policy: str) -> None:
    parse(["chat", "--policy", policy.lower()])
