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
from soma.common.v1.turn_pb2 import Delivery, Outcome
from soma.controlplane.v1.agent_service_pb2 import AgentSpec
from soma.router.v1.inbound_pb2 import InBatch

from services.cognition.domain.conversation import Conversation, read_message, text_of
from services.cognition.domain.turn import Next, kind_of, read_step, replay
from services.router.domain.turn import replay as router_replay
from tests.contract.golden.record import SAID
from tests.contract.golden.releases import ROOT, Release, must_be_there, releases
from tests.unit.router.builders import PARTITIONS
from tests.unit.router.test_ingest_messages import World

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


RECORDED = [(release.name, json.loads(release.recorded.read_text(encoding="utf-8"))) for release in RELEASES]
each_recording = pytest.mark.parametrize("recorded", [r for _, r in RECORDED], ids=[name for name, _ in RECORDED])


@each_recording
def test_batches_on_the_lane_are_taken_in(recorded: dict[str, Any]) -> None:
    """Every item becomes an entry of the mailbox, with its content; nothing is set aside."""
    world = World(*range(PARTITIONS))
    items = 0
    for seq, message in enumerate(recorded["lane"], start=1):
        data = bytes.fromhex(message["data"])
        items += len(InBatch.FromString(data).items)
        world.raw(seq, data)
    entries = [entry for item in world.mail for entry in item.entries]
    assert len(entries) == items > 0
    assert not world.dead
    assert not any(entry.message.fault for entry in entries)
    said = {read_message(entry.inbound.content).parts[0].text for entry in entries if not entry.is_control}
    assert said == {text for _, text in SAID}
    assert sum(entry.is_control for entry in entries) == 1


@each_recording
def test_journals_are_replayed(recorded: dict[str, Any]) -> None:
    """By brains, to go on from any step; by routers, which allow what came next; the conversation is what was said."""
    kinds = set()
    for turn in recorded["turns"]:
        journal = [read_step(bytes.fromhex(step["body"])) for step in turn["steps"]]
        assert [kind_of(step) for step in journal] == [step["kind"] for step in turn["steps"]]
        kinds |= {step["kind"] for step in turn["steps"]}
        for length in range(len(journal)):
            assert replay(journal[:length]).next is not Next.NOTHING
            router_replay([step["kind"] for step in turn["steps"][:length]])
        assert replay(journal).next is Next.NOTHING
        before_its_end = Conversation([], [bytes.fromhex(content) for content in turn["inputs"]], journal[:-1])
        inputs, shown = before_its_end.inputs(), before_its_end.transcript()
        assert {text_of(message) for message in inputs} <= {text for _, text in SAID}
        assert shown[: len(inputs)] == inputs, "its replies, which do not say so, had read them all"
        assert len(shown) == len(inputs) + len(journal) - 1
        assert AgentSpec.FromString(bytes.fromhex(turn["spec"])).model
    assert len(kinds) == 4, "a reply with calls, their results, a final and a failure"


@each_recording
def test_outcomes_that_wait_for_their_adapter_are_read(recorded: dict[str, Any]) -> None:
    deliveries = [Delivery.FromString(bytes.fromhex(row["payload"])) for row in recorded["deliveries"]]
    outcomes = [Outcome.Name(delivery.outcome) for delivery in deliveries]
    assert sorted(outcomes) == ["OUTCOME_ERROR"] + ["OUTCOME_FINAL"] * 3
    assert {delivery.message.parts[0].text for delivery in deliveries if delivery.HasField("message")} == {
        "hello", "once more", "done: a table for two",
    }  # fmt: skip
