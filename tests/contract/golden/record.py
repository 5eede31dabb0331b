"""Records what a release writes when it runs: batches on the lane, journals, outcomes.

python -m tests.contract.golden.record      # of the newest release in releases.toml, whose services it starts
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path

import nats
from nats.aio.msg import Msg

from soma_common.client.channel_client import ChannelClient
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import Fail, RecordedCall, Reply
from somastack.layout import Layout
from somastack.parts import NatsPart
from tests.chaos.stack import CLERK, ECHO, FaultyStack, errand, faulty_stack
from tests.contract.golden.releases import Release, previous

TURNS = """SELECT t.turn_id, s.agent, r.spec FROM router.turns t
           JOIN router.sessions s USING (session_id)
           JOIN router.agent_revisions r ON r.tenant = s.tenant AND r.agent = s.agent AND r.revision = t.agent_revision
           ORDER BY s.agent, t.number"""
STEPS = "SELECT kind, body FROM router.steps WHERE turn_id = $1 ORDER BY step"
INPUTS = """SELECT m.content FROM router.turns t JOIN router.messages m ON m.session_id = t.session_id
            AND m.position BETWEEN t.first_position AND t.last_position
            WHERE t.turn_id = $1 AND m.kind = 1 ORDER BY m.position"""
SAID = ((ECHO, "hello"), (ECHO, "once more"), (CLERK, "a table for two"), (CLERK, "refuse this"))


async def record(release: Release) -> None:
    """Start the release's services, have a conversation of every kind, and write what is stored of it."""
    with tempfile.TemporaryDirectory() as scratch:
        code = release.extract(Path(scratch))
        path = {"PYTHONPATH": f"{code}{os.pathsep}{code / 'gen'}"}
        async with faulty_stack(environment={i.name: path for i in Layout().instances()}) as stack:
            stack.model.rule = _rule
            recorded = await _converse(stack)
    release.recorded.parent.mkdir(parents=True, exist_ok=True)
    release.recorded.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _rule(call: RecordedCall) -> Reply:
    return Fail(400, "not this") if "refuse" in str(call.messages) else errand(call)


async def _converse(stack: FaultyStack) -> dict[str, list[dict[str, object]]]:
    lane: list[dict[str, object]] = []

    async def stored(message: Msg) -> None:
        lane.append({"subject": message.subject, "headers": dict(message.headers or {}), "data": message.data.hex()})

    part = stack.parts["nats"]
    assert isinstance(part, NatsPart)
    bus = await nats.connect(part.server.url, token=part.server.token)
    await bus.subscribe("soma.*.in.*", cb=stored)
    async with ChannelClient(
        stack.gateways, token=stack.token("demo"), tenant="demo", channel="golden", instance="golden-1", credit=0
    ) as client:
        for agent, text in SAID:
            await client.send(agent, f"with-{agent}", text)
        await client.cancel(ECHO, "where-nothing-runs")
    database = await stack.database()
    await eventually(
        lambda: database.fetchval("SELECT count(*) = $1 FROM router.turns WHERE status = 3", len(SAID)), 20, "all ended"
    )
    turns = await database.fetch(TURNS)
    steps = {turn["turn_id"]: await database.fetch(STEPS, turn["turn_id"]) for turn in turns}
    inputs = {turn["turn_id"]: await database.fetch(INPUTS, turn["turn_id"]) for turn in turns}
    deliveries = await database.fetch("SELECT payload FROM router.deliveries ORDER BY position")
    await database.close()
    await bus.close()
    return {
        "lane": lane,
        "turns": [
            {
                "agent": turn["agent"],
                "spec": turn["spec"].hex(),
                "inputs": [row["content"].hex() for row in inputs[turn["turn_id"]]],
                "steps": [{"kind": row["kind"], "body": row["body"].hex()} for row in steps[turn["turn_id"]]],
            }
            for turn in turns
        ],
        "deliveries": [{"payload": row["payload"].hex()} for row in deliveries],
    }


if __name__ == "__main__":
    asyncio.run(record(previous()))
