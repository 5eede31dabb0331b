"""Turns that get further inputs while they run, over random interleavings, in a real brain with a model and tools that
wait to be told. Whatever happens, in whichever order:

- each model call's transcript begins with the one before, and is one that any model takes
- a brain that replays the journal asks the model exactly what the brain asked that lived through it
- the final has read every input and says everything that interim replies have said
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import struct_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.adapters.models.openai_chat import render_messages
from services.cognition.adapters.models.registry import ModelRegistry
from services.cognition.application.ports import (
    Emit,
    Invocation,
    ModelAnswer,
    ModelRequest,
    Outgoing,
    RequestedCall,
    ToolDescription,
)
from services.cognition.application.run_turn import RunPolicy, TurnRunner
from services.cognition.application.serve_routers import Brain
from soma_common.gather import Gather
from tests.unit.cognition import stories

ENOUGH_ROUNDS = 12
"""Turns of the event loop in which everything that can happen without the test has happened."""


@dataclass(frozen=True)
class Round:
    """One model call and what follows it; numbers are inputs that come in the meantime."""

    calls: int
    """Tools the model asks for; 0: it answers."""
    while_thinking: int
    before_confirmed: int
    while_tools_run: int
    told_again: int
    """Inputs that are sent once more with each further one."""


few = st.sampled_from([0, 0, 1, 2])
rounds = st.lists(st.builds(Round, st.integers(0, 2), few, few, few, st.integers(0, 3)), min_size=1, max_size=6)


@dataclass
class Asked:
    """A call of the model."""

    step: int
    seen: int
    messages: list[dict[str, Any]]


class ToldModel:
    """Answers what the test says, when it says so."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answer_with: asyncio.Future[ModelAnswer] | None = None

    async def answer(self, request: ModelRequest, emit: Emit) -> ModelAnswer:
        messages: Any = render_messages(request)
        self.asked.append(Asked(request.origin.step, request.conversation.input_count, messages))
        self.answer_with = asyncio.get_running_loop().create_future()
        return await self.answer_with


class ToldTools:
    """Tools that run until the test says that they are done."""

    def __init__(self) -> None:
        self.done = asyncio.Event()

    async def describe(self, tenant: str) -> Mapping[str, ToolDescription]:
        return {"t": ToolDescription("t", "", {})}

    async def invoke(
        self, invocation: Invocation, timeout_s: float
    ) -> tuple[struct_pb2.Value, message_pb2.Error | None]:
        await self.done.wait()
        return struct_pb2.Value(string_value=f"result of {invocation.key[-3:]}"), None


@dataclass
class Story:
    """What the router knows of the turn: all its inputs, and its journal."""

    inputs: list[bytes] = field(default_factory=list)
    journal: list[bytes] = field(default_factory=list)

    def further(self, count: int) -> None:
        for _ in range(count):
            self.inputs.append(stories.user(f"input {len(self.inputs)}").SerializeToString())

    def start(self, dispatch: int, inputs: int, steps: int) -> cognition.StartTurn:
        begin = stories.start(model="told/model", dispatch=dispatch, tools=["t"], max_steps=100)
        del begin.inputs[:]
        begin.inputs.extend(self.inputs[:inputs])
        begin.journal.extend(self.journal[:steps])
        return begin


class Stage:
    """A brain with one router's stream."""

    def __init__(self) -> None:
        self.model, self.tools = ToldModel(), ToldTools()
        runner = TurnRunner(ModelRegistry({"told": self.model}, {}), self.tools, RunPolicy())
        self.brain = Brain("cognition-0", runner, max_turns=1)
        self.outbox: Gather[Outgoing] = Gather(1000)
        self.session = self.brain.connect("router-0", 1, self.outbox)

    async def take(self, **frame: Any) -> None:
        self.session.take(cognition.RunTurnsRequest(**frame))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(ENOUGH_ROUNDS):
            await asyncio.sleep(0)

    def proposed(self) -> cognition.Proposal:
        """The one proposal since the last look."""
        (proposal,) = self.outbox.take_now()
        assert isinstance(proposal, cognition.Proposal)
        return proposal

    async def close(self) -> None:
        self.session.close(None)
        if self.brain.unwinding:
            await asyncio.wait(self.brain.unwinding)


class Play:
    """The router's part, over the rounds of a story."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.story = Story()

    async def run(self, story: Sequence[Round]) -> cognition.Proposal:
        """Plays the rounds and an end; returns the final as it was journaled."""
        self.story.further(1)
        await self.stage.take(starts=[self.story.start(1, 1, 0)])
        for told in story:
            final = await self.round(told)
            if final is not None:
                return final
        final = await self.round(Round(0, 0, 0, 0, 0))
        assert final is not None
        return final

    async def round(self, told: Round) -> cognition.Proposal | None:
        """One model call and what follows; the final if the turn has ended with it."""
        stage = self.stage
        await self.steer(told.while_thinking, told.told_again)
        assert stage.model.answer_with is not None
        number = len(stage.model.asked)
        calls = [RequestedCall("", "t", {"n": i}) for i in range(told.calls)]
        stage.model.answer_with.set_result(ModelAnswer(f"answer {number}", calls))
        await stage.settle()
        proposal = stage.proposed()
        if proposal.kind == cognition.STEP_KIND_FINAL:
            assert proposal.inputs_seen == len(self.story.inputs)
            if not told.before_confirmed:
                await self.journal(proposal)
                return proposal
            step = proposal.step
            await self.steer(told.before_confirmed, told.told_again)
            proposal = stage.proposed()
            assert (proposal.kind, proposal.step) == (cognition.STEP_KIND_INTERIM_REPLY, step)
        await self.steer(told.before_confirmed, told.told_again)
        await self.journal(proposal)
        if proposal.kind == cognition.STEP_KIND_MODEL_REPLY:
            await self.steer(told.while_tools_run, told.told_again)
            stage.tools.done.set()
            await stage.settle()
            stage.tools.done.clear()
            await self.journal(stage.proposed())
        return None

    async def steer(self, count: int, told_again: int) -> None:
        if not count:
            return
        known = len(self.story.inputs)
        self.story.further(count)
        first = max(0, known - told_again)
        more = cognition.AddInputs(turn_id=stories.TURN, dispatch=1, first=first, inputs=self.story.inputs[first:])
        await self.stage.take(add_inputs=[more])

    async def journal(self, proposal: cognition.Proposal) -> None:
        assert proposal.step == len(self.story.journal) + 1
        self.story.journal.append(proposal.body)
        confirm = cognition.Confirm(turn_id=stories.TURN, dispatch=1, step=proposal.step)
        await self.stage.take(confirms=[confirm])


def check_any_model_takes(messages: Sequence[Mapping[str, Any]]) -> None:
    """Calls are followed by their results, one each and in order, and by nothing else; results follow nothing else."""
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            assert waiting, "a result without a call"
            assert message["tool_call_id"] == waiting.pop(0)
            continue
        assert not waiting, "a call without its result"
        if message["role"] == "assistant":
            waiting = [call["id"] for call in message.get("tool_calls", ())]
            assert waiting or message["content"]
    assert not waiting


@settings(max_examples=120, deadline=None)
@given(rounds)
def test_a_replay_asks_what_the_brain_asked_that_lived_through_it(story: list[Round]) -> None:
    async def play() -> None:
        lived = Play()
        final = await lived.run(story)
        asked = lived.stage.model.asked
        assert lived.stage.session.running == 0
        await lived.stage.close()

        for before, after in zip([Asked(0, 0, []), *asked], asked, strict=False):
            check_any_model_takes(after.messages)
            assert after.messages[: len(before.messages)] == before.messages, "what was said once stands for good"
        heard = [m["content"] for m in asked[-1].messages if m["role"] == "user"]
        assert heard == [f"input {i}" for i in range(len(lived.story.inputs))], "each input once, in order"

        steps = [turn_pb2.StepBody.FromString(body) for body in lived.story.journal]
        interims = [s.model_reply.text for s in steps if s.HasField("model_reply") and not s.model_reply.tool_calls]
        answer = message_pb2.Message.FromString(final.answer)
        assert [part.text for part in answer.parts] == [*interims, f"answer {len(asked)}"]

        for call in asked:
            replay = Stage()
            await replay.take(starts=[lived.story.start(2, call.seen, call.step - 1)])
            assert replay.model.asked == [call]
            await replay.close()

    asyncio.run(play())


@settings(max_examples=60, deadline=None)
@given(rounds, st.data())
def test_a_journal_of_which_an_older_release_wrote_a_part_is_still_a_transcript(
    story: list[Round], data: st.DataObject
) -> None:
    """Its replies do not say what they had read. Where the inputs then stand is a guess, but every model takes it."""

    async def play() -> None:
        lived = Play()
        await lived.run(story)
        await lived.stage.close()
        steps = [turn_pb2.StepBody.FromString(body) for body in lived.story.journal[:-1]]
        for step in steps:
            if step.HasField("model_reply") and data.draw(st.booleans()):
                step.model_reply.inputs_seen = 0
        lived.story.journal = [step.SerializeToString() for step in steps]
        replay = Stage()
        await replay.take(starts=[lived.story.start(2, len(lived.story.inputs), len(steps))])
        (call,) = replay.model.asked
        check_any_model_takes(call.messages)
        heard = [m["content"] for m in call.messages if m["role"] == "user"]
        assert heard == [f"input {i}" for i in range(len(lived.story.inputs))]
        await replay.close()

    asyncio.run(play())
