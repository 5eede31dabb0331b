"""Runs one turn: think, propose, wait until it is journaled, act, think again.

    StartTurn --replay--> Turn --CALL_MODEL--> Model --calls--> journal.record --> ToolCaller --> journal.record --+
                           ^                     |                                                                 |
                           |                     +--answer--> journal.conclude --> over                            |
                           |                                       |                                               |
                           |                       further inputs came: journal.record (interim reply)             |
                           +---------------------------------------+-----------------------------------------------+

Nothing is done that is not journaled first, and nothing is kept that is not in the journal: whatever dies, another
brain gets the journal and goes on here. Inputs that come while the turn runs are read by its next model call. Every way
out but a stop ends with a final or with a failure that has a typed error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog
from google.protobuf import struct_pb2
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.application.call_tools import ToolCaller
from services.cognition.application.ports import (
    CallOrigin,
    Journal,
    ModelAnswer,
    ModelRequest,
    Models,
    RequestedCall,
    ToolDescription,
    Tools,
    reply_too_long,
)
from services.cognition.application.retrying import Backoff, retrying
from services.cognition.application.stream_text import TextStream
from services.cognition.domain.agent import Agent, read_agent
from services.cognition.domain.conversation import Conversation
from services.cognition.domain.turn import STEP_FORMAT, Next, Turn, check_depth, read_step, replay
from soma_common.errors import DeadlineExceeded, FailedPrecondition, Internal, SomaError, reason_name, to_proto
from soma_common.failpoints import failpoint_async
from soma_common.timers import Deadline, SharedTimers

_DEADLINE_GRAIN_S: Final = 0.01
"""How much later than its time a step may end, in seconds."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """Bounds that hold for every turn; the agent's own limits come with its spec."""

    model_attempts: int = 3
    """Tries of one model call, as long as nothing of its text was shown."""
    model_backoff: Backoff = field(default_factory=lambda: Backoff(0.2, 5.0))
    tool_backoff: Backoff = field(default_factory=lambda: Backoff(0.05, 1.0))
    text_linger_s: float = 0.02
    """Shortest time between two texts of a turn."""
    max_reply_bytes: int = 256 * 1024
    """Longest reply of a model, its tool calls included."""
    max_calls: int = 32
    """Most tool calls of one reply."""
    max_turn_bytes: int = 4 * 1024 * 1024
    """Most bytes of a turn's steps before another model call: a turn is started again with all of them in one frame."""
    max_result_bytes: int = 256 * 1024
    """Largest result of a tool."""


class TurnRunner:
    """Runs turns with the models and tools of this brain. One for all turns; made on the event loop it runs on."""

    def __init__(self, models: Models, tools: Tools, policy: RunPolicy) -> None:
        # Kept, because asking for the running loop is a system call (getpid) before Python 3.12, several per turn.
        self._loop = asyncio.get_running_loop()
        self._deadlines = SharedTimers(_DEADLINE_GRAIN_S)
        self._models = models
        self._tools = tools
        self._policy = policy
        self._tool_caller = ToolCaller(tools, backoff=policy.tool_backoff, max_result_bytes=policy.max_result_bytes)

    async def run(self, start: cognition.StartTurn, journal: Journal) -> None:
        """Runs a turn from where its journal ends until its last step is proposed. Raises only what a defect raises,
        and a cancel.

        A journal that has its last step already is handed to nobody: the turn is over and nothing is proposed.
        """
        journaled = start.journal
        steps: list[turn_pb2.StepBody] = []
        try:
            steps.extend(map(read_step, journaled))
            turn = replay(steps)
            _check_inputs(turn, len(start.inputs))
            agent = read_agent(start.agent_spec)
            conversation = Conversation(start.context, journal.inputs, steps)
            turn_deadline = self._loop.time() + agent.turn_timeout_s
            await self._live(start, journal, turn, agent, conversation, turn_deadline)
        except SomaError as error:
            # A journal that cannot be read is left as it is: the failure goes behind it.
            _fail(start, journal, max(len(steps), len(journaled)) + 1, error)

    async def _go_on(
        self,
        start: cognition.StartTurn,
        journal: Journal,
        turn: Turn,
        agent: Agent,
        conversation: Conversation,
        turn_deadline: float,
        denied: turn_pb2.FinalMessage,
    ) -> None:
        """Goes on with a turn whose final was not taken because further inputs came: it becomes an interim reply."""
        try:
            await self._record(journal, turn, conversation, _interim_of(denied))
            await self._live(start, journal, turn, agent, conversation, turn_deadline)
        except SomaError as error:
            _fail(start, journal, turn.steps + 1, error)

    async def _live(
        self,
        start: cognition.StartTurn,
        journal: Journal,
        turn: Turn,
        agent: Agent,
        conversation: Conversation,
        turn_deadline: float,
    ) -> None:
        """Takes step after step, until the turn is over or nothing is left to do but to have the final journaled."""
        loop = self._loop
        while turn.next is not Next.NOTHING:
            if turn.next is Next.RUN_TOOLS:
                await failpoint_async("cognition.after_confirm_before_tool")
                deadline = min(turn_deadline, loop.time() + agent.step_timeout_s)
                step = await self._tool_caller.run(start, turn.steps, turn.calls, agent.tools, deadline)
                await failpoint_async("cognition.after_tool_before_result")
            else:
                self._check_limits(turn, agent, conversation, loop.time() >= turn_deadline)
                answer = await self._think(start, journal, turn, agent, conversation, turn_deadline)
                step = self._step_of(answer, turn, agent, conversation)
            if step.WhichOneof("body") == "final":
                await failpoint_async("cognition.before_proposal")
                final = step.final
                go_on = partial(self._go_on, start, journal, turn, agent, conversation, turn_deadline, final)
                if journal.conclude(turn.steps + 1, step, final.inputs_seen, go_on):
                    return
                step = _interim_of(final)
            await self._record(journal, turn, conversation, step)

    async def _record(self, journal: Journal, turn: Turn, conversation: Conversation, step: turn_pb2.StepBody) -> None:
        """Has a step journaled, and only then takes it for made."""
        await failpoint_async("cognition.before_proposal")
        await journal.record(turn.steps + 1, step)
        turn.record(step)
        conversation.steps.append(step)

    async def _think(
        self,
        start: cognition.StartTurn,
        journal: Journal,
        turn: Turn,
        agent: Agent,
        conversation: Conversation,
        turn_deadline: float,
    ) -> ModelAnswer:
        """One model call with its retries, its text shown as it comes, within the step's and the turn's time."""
        model = self._models.of(agent.provider)
        step = turn.steps + 1
        step_deadline = self._loop.time() + agent.step_timeout_s
        deadline = min(step_deadline, turn_deadline)
        text = TextStream(journal, step, self._policy.text_linger_s, self._loop)

        async def ask(attempt: int) -> ModelAnswer:
            conversation.read_up_to(journal.inputs)
            origin = CallOrigin(start.turn_id, step, start.dispatch, attempt, start.traceparent)
            return await model.answer(
                ModelRequest(
                    model=agent.model,
                    instructions=agent.instructions,
                    conversation=conversation,
                    tools=tools,
                    temperature=agent.temperature,
                    max_output_tokens=agent.max_output_tokens,
                    max_reply_bytes=self._policy.max_reply_bytes,
                    origin=origin,
                ),
                text.add,
            )

        task = asyncio.current_task(self._loop)
        assert task is not None
        scope = Deadline(self._deadlines, deadline, task)
        try:
            with scope:
                tools = await self._tools_of(agent, start.session.tenant, deadline) if agent.tools else ()
                answer = await retrying(
                    ask,
                    backoff=self._policy.model_backoff,
                    deadline=deadline,
                    attempts=self._policy.model_attempts,
                    # What was shown cannot be taken back within a dispatch, and a second answer would not fit to it.
                    may_retry=lambda: not text.started,
                )
            text.finish()
            return answer
        except TimeoutError as late:
            if not scope.expired:
                raise
            raise _too_late(agent, deadline < step_deadline) from late
        finally:
            text.close()

    async def _tools_of(self, agent: Agent, tenant: str, deadline: float) -> Sequence[ToolDescription]:
        """What the model is told of the agent's tools. One that the gateway does not know is left out."""
        known = await retrying(
            lambda _: self._tools.describe(tenant), backoff=self._policy.tool_backoff, deadline=deadline
        )
        return [known[name] for name in agent.tools if name in known]

    def _step_of(self, answer: ModelAnswer, turn: Turn, agent: Agent, conversation: Conversation) -> turn_pb2.StepBody:
        """The step an answer makes: a final, or a reply whose tools fit into what is left of the turn.

        A final says what the turn's interim replies have said too, so that whoever gets only the answer misses nothing.
        """
        policy = self._policy
        if not answer.text and not answer.calls:
            raise _rejected(
                "the model answered with nothing; if it thinks before it speaks, raise the agent's max_output_tokens"
            )
        if len(answer.calls) > policy.max_calls:
            raise _rejected(f"the model called {len(answer.calls)} tools at once, {policy.max_calls} are allowed")
        step = turn_pb2.StepBody(format=STEP_FORMAT)
        body: turn_pb2.FinalMessage | turn_pb2.ModelReply
        if not answer.calls:
            body = step.final
            message = body.message
            message.role = message_pb2.ROLE_ASSISTANT
            for text in conversation.interim_texts():
                message.parts.add(text=text)
            message.parts.add(text=answer.text)
        elif not turn.has_room_for_tools(agent.max_steps):
            raise _step_limit(agent)
        else:
            body = step.model_reply
            body.text = answer.text
            body.tool_calls.extend(_journaled_call(index, call) for index, call in enumerate(answer.calls))
        body.inputs_seen = conversation.input_count
        body.model = answer.model or f"{agent.provider}/{agent.model}"
        if answer.input_tokens or answer.output_tokens:
            body.usage.input_tokens, body.usage.output_tokens = answer.input_tokens, answer.output_tokens
        if body.ByteSize() > policy.max_reply_bytes:
            raise reply_too_long(policy.max_reply_bytes)
        return step

    def _check_limits(self, turn: Turn, agent: Agent, conversation: Conversation, late: bool) -> None:
        """Whether the turn may call the model once more. Raises TURN_TIMEOUT, STEP_LIMIT or CONTEXT_TOO_LONG."""
        if late:
            raise _too_late(agent, of_turn=True)
        if not turn.has_room(agent.max_steps):
            raise _step_limit(agent)
        if turn.steps and sum(step.ByteSize() for step in conversation.steps) > self._policy.max_turn_bytes:
            raise FailedPrecondition(
                reasons.ERROR_REASON_CONTEXT_TOO_LONG,
                f"the tools of this turn answered more than the {self._policy.max_turn_bytes} bytes a turn may hold",
                {"max_turn_bytes": str(self._policy.max_turn_bytes)},
            )


def _fail(start: cognition.StartTurn, journal: Journal, step: int, error: SomaError) -> None:
    _log.warning(
        "turn.failed",
        tenant=start.session.tenant,
        turn=start.turn_id.hex(),
        step=step,
        reason=reason_name(error.reason),
        message=error.message,
    )
    journal.fail(step, turn_pb2.StepBody(format=STEP_FORMAT, failure=to_proto(error)))


def _check_inputs(turn: Turn, inputs: int) -> None:
    """Raises ITEM_CORRUPT if the journal has read inputs that the turn does not have."""
    if turn.inputs_seen > inputs:
        raise Internal(
            reasons.ERROR_REASON_ITEM_CORRUPT,
            f"the turn's journal has read {turn.inputs_seen} inputs, but it was started with {inputs}",
        )


def _interim_of(final: turn_pb2.FinalMessage) -> turn_pb2.StepBody:
    """The step for an answer that was not taken as the final, because the turn had got further inputs."""
    reply = turn_pb2.ModelReply(text=final.message.parts[-1].text, model=final.model, inputs_seen=final.inputs_seen)
    if final.HasField("usage"):
        reply.usage.CopyFrom(final.usage)
    return turn_pb2.StepBody(format=STEP_FORMAT, model_reply=reply)


def _journaled_call(index: int, call: RequestedCall) -> turn_pb2.ToolCall:
    """A call as it is journaled; arguments that are no JSON object, or hold what cannot be stored, are left unset."""
    journaled = turn_pb2.ToolCall(index=index, call_id=call.call_id, tool=call.tool)
    if call.arguments is None:
        return journaled
    arguments = struct_pb2.Struct()
    with suppress(ValueError, TypeError, OverflowError, RecursionError):
        arguments.update(call.arguments)
        if check_depth(lambda: _step_with(turn_pb2.ToolCall(arguments=arguments))):
            journaled.arguments.CopyFrom(arguments)
    return journaled


def _step_with(call: turn_pb2.ToolCall) -> turn_pb2.StepBody:
    return turn_pb2.StepBody(format=STEP_FORMAT, model_reply=turn_pb2.ModelReply(tool_calls=[call]))


def _rejected(text: str) -> SomaError:
    return FailedPrecondition(reasons.ERROR_REASON_MODEL_REJECTED, text)


def _step_limit(agent: Agent) -> SomaError:
    return FailedPrecondition(
        reasons.ERROR_REASON_STEP_LIMIT,
        f"the turn would need more than the {agent.max_steps} steps its agent may take; raise the agent's max_steps",
        {"max_steps": str(agent.max_steps)},
    )


def _too_late(agent: Agent, of_turn: bool) -> SomaError:
    if of_turn:
        reason, what, limit_s = reasons.ERROR_REASON_TURN_TIMEOUT, "turn", agent.turn_timeout_s
    else:
        reason, what, limit_s = reasons.ERROR_REASON_MODEL_TIMEOUT, "step", agent.step_timeout_s
    milliseconds = round(limit_s * 1000)
    return DeadlineExceeded(
        reason,
        f"the {what} took longer than {milliseconds} ms; raise the agent's {what}_timeout_ms",
        {f"{what}_timeout_ms": str(milliseconds)},
    )
