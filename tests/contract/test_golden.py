"""What earlier releases wrote is read by today's code, to the same meaning."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pool import Default
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from tests.contract.golden.releases import ROOT, Release, must_be_there, releases

RELEASES = releases()
for _path in sorted((ROOT / "gen").rglob("soma/**/*_pb2.py")):
    importlib.import_module(".".join(_path.relative_to(ROOT / "gen").with_suffix("").parts))


def _messages(release: Release) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for path in sorted(release.examples.glob("*.json")):
        for name, examples in json.loads(path.read_text(encoding="utf-8")).items():
            yield f"{path.stem}.{name}", examples


MESSAGES = [(release.name, name, examples) for release in RELEASES for name, examples in _messages(release)]


@pytest.mark.parametrize(("release", "name", "examples"), MESSAGES, ids=[f"{m[0]}-{m[1]}" for m in MESSAGES])
def test_a_message_of_an_earlier_release_means_the_same(
    release: str, name: str, examples: list[dict[str, Any]]
) -> None:
    message_class = GetMessageClass(Default().FindMessageTypeByName(name))
    for example in examples:
        message = message_class.FromString(bytes.fromhex(example["hex"]))
        assert list(_unknown(message)) == []
        assert MessageToDict(message, preserving_proto_field_name=True) == example["means"]


def _unknown(message: Message) -> Iterator[str]:
    """Fields that today's code would drop."""
    fields = UnknownFieldSet(message)
    for field in (fields[number] for number in range(len(fields))):
        yield f"{message.DESCRIPTOR.full_name} {field.field_number}"
    for known, value in message.ListFields():
        if known.message_type is not None and not known.message_type.GetOptions().map_entry:
            for inner in value if known.is_repeated else [value]:
                yield from _unknown(inner)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_the_examples_are_what_the_release_itself_writes(release: Release, tmp_path: Path) -> None:
    """Of every message it has: nobody has changed an example to make a test pass."""
    if absent := release.absent:
        assert not must_be_there(), absent
        pytest.skip(absent)
    release.write_examples(release.extract(tmp_path / "code"), tmp_path / "out")
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert written == {path.name: path.read_text(encoding="utf-8") for path in release.examples.glob("*.json")}


def test_what_goes_over_the_wire_has_examples() -> None:
    """The messages that processes of two releases exchange, or that one writes and the other reads."""
    named = {name for release, name, _ in MESSAGES if release == RELEASES[-1].name}
    assert named >= {
        "soma.router.v1.InBatch",
        "soma.router.v1.OutBatch",
        "soma.router.v1.AckBatch",
        "soma.router.v1.Presence",
        "soma.router.v1.LiveBatch",
        "soma.router.v1.WatchQuery",
        "soma.router.v1.WatchSnapshot",
        "soma.common.v1.Message",
        "soma.common.v1.StepBody",
        "soma.common.v1.Delivery",
        "soma.common.v1.LiveEvent",
        "soma.cognition.v1.RunTurnsRequest",
        "soma.cognition.v1.RunTurnsResponse",
        "soma.controlplane.v1.AgentSpec",
        "soma.controlplane.v1.WatchConfigResponse",
        "soma.gateway.v1.ConnectRequest",
        "soma.gateway.v1.ConnectResponse",
        "soma.toolgw.v1.InvokeToolRequest",
        "soma.toolgw.v1.InvokeToolResponse",
    }
    bodies = next(examples for release, name, examples in MESSAGES if name == "soma.common.v1.StepBody")
    assert {kind for example in bodies for kind in example["means"]} >= {
        "model_reply",
        "tool_results",
        "final",
        "failure",
    }
