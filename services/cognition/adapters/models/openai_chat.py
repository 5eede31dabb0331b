"""Any endpoint that speaks OpenAI's chat completions, through the `openai` library (port `Model`).

    ModelRequest -> render_messages -> POST /chat/completions (streamed) -> _Assembly -> ModelAnswer
                                                                  pieces of text -> emit

Connections, credentials and status errors are the library's; the events of the stream are read here, because building
the library's objects for every token costs ten times the token (measured: 6 ms of CPU per 50), and because endpoints
differ in what they leave out. Retries are the caller's: it knows whether anything was shown and how much time is
left.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, cast

import httpx2
import openai
import orjson
import structlog
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolUnionParam
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.application.ports import (
    CallOrigin,
    Emit,
    ModelAnswer,
    ModelRequest,
    RequestedCall,
    ToolDescription,
    reply_too_long,
)
from services.cognition.domain.conversation import Json, printable, result_text, spoken, to_dict
from services.cognition.domain.turn import is_interim
from soma_common.errors import Reason, SomaError, class_of
from soma_common.settings import StartRefused

_ROLES: Final = {
    message_pb2.ROLE_UNSPECIFIED: "user",
    message_pb2.ROLE_USER: "user",
    message_pb2.ROLE_ASSISTANT: "assistant",
    message_pb2.ROLE_TOOL: "user",
    message_pb2.ROLE_SYSTEM: "system",
}
OPENAI_URL: Final = "https://api.openai.com/v1"
NO_KEY: Final = "none"
"""What is sent to an endpoint that wants no key: the library insists on one."""

_DATA: Final = "data:"
_DONE: Final = "[DONE]"
_CONTEXT_WORDS: Final = ("context length", "context_length", "context window", "maximum context", "too many tokens")
_MAX_QUOTED: Final = 300
_MAX_RETRY_AFTER_S: Final = 86_400.0
"""Longest wait that is passed on, in seconds: an error's fields cannot hold all that a header can, such as `inf`."""
_KEY: Final = re.compile(r"[\x21-\x7e]+")
"""What a header can carry. The errors of the libraries about any other key quote it."""
_TOLD_EVERY_S: Final = 10.0
"""An endpoint that stays away fails every call of every turn; the log says it once in so long."""

_log = structlog.get_logger(__name__)


def open_endpoint(
    base_url: str | None,
    api_key: str | None,
    *,
    connect_timeout_s: float,
    read_timeout_s: float,
    max_connections: int,
) -> openai.AsyncOpenAI:
    """A client of an endpoint that leaves retries to us.

    `base_url` None is OpenAI's own, `api_key` None is for endpoints that want none. `read_timeout_s` bounds the silence
    of the endpoint, not the whole answer; calls over `max_connections` wait for a connection. Raises StartRefused for a
    key that no header can carry.
    """
    if api_key is not None and not _KEY.fullmatch(api_key):
        raise StartRefused(
            "SOMA_OPENAI_API_KEY holds a character that no key has, such as a line end, a blank or a letter with an "
            "accent: set it again"
        )
    return openai.AsyncOpenAI(
        api_key=api_key or NO_KEY,
        # Said here, or the library would look for OPENAI_BASE_URL: settings come from one place.
        base_url=base_url or OPENAI_URL,
        max_retries=0,
        timeout=httpx2.Timeout(read_timeout_s, connect=connect_timeout_s),
        http_client=openai.DefaultAsyncHttpxClient(
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        ),
    )


class OpenAIChat:
    """Calls the endpoint that `client` is made for (`open_endpoint`)."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client
        self._endpoint = _address(client)
        self._quiet_until = float("-inf")

    async def answer(self, request: ModelRequest, emit: Emit) -> ModelAnswer:
        """One streamed completion. Raises SomaError of the MODEL_ reasons or CONTEXT_TOO_LONG."""
        assembly = _Assembly(emit, request.max_reply_bytes)
        try:
            async with self._client.chat.completions.with_streaming_response.create(
                model=request.model,
                messages=render_messages(request),
                tools=_render_tools(request.tools) if request.tools else openai.omit,
                temperature=request.temperature if request.temperature is not None else openai.omit,
                max_completion_tokens=request.max_output_tokens or openai.omit,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers=_headers(request.origin),
            ) as response:
                await assembly.read(response.iter_lines())
        except openai.APIStatusError as error:
            raise _status_error(error) from error
        except openai.APIError as error:
            self._tell(error.__cause__ or error)
            raise _error_of(error) from error
        except httpx2.TimeoutException as error:
            self._tell(error)
            text = "the model endpoint fell silent in the middle of its answer"
            raise _fail(reasons.ERROR_REASON_MODEL_TIMEOUT, text) from error
        except httpx2.HTTPError as error:
            self._tell(error)
            raise _unavailable("the connection to the model endpoint broke in the middle of its answer") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _unavailable(f"the model endpoint's answer is no chat completion: {error!r:.200}") from error
        return assembly.answer()

    def _tell(self, cause: BaseException) -> None:
        """Logs which endpoint fails and why. The turn's error goes to tenants, whom the address does not concern."""
        now = asyncio.get_running_loop().time()
        if now < self._quiet_until:
            return
        self._quiet_until = now + _TOLD_EVERY_S
        _log.warning(
            "model.endpoint_failed",
            endpoint=self._endpoint,
            error=f"{type(cause).__name__}: {cause!s:.200}".removesuffix(": "),
            check="SOMA_OPENAI_BASE_URL, and that the endpoint runs",
        )


class _Assembly:
    """Puts a stream of completion chunks together. Raises ValueError and its like for what is no chunk."""

    def __init__(self, emit: Emit, max_bytes: int) -> None:
        self._emit = emit
        self._max_bytes = max_bytes
        self._size = 0
        self._text: list[str] = []
        self._calls: list[dict[str, str]] = []
        self._by_index: dict[int, dict[str, str]] = {}
        self._usage: dict[str, Any] = {}
        self._model = ""
        self._finished = False

    async def read(self, lines: AsyncIterator[str]) -> None:
        """Reads server-sent events to their end. Raises MODEL_UNAVAILABLE if they end before the answer does."""
        async for line in lines:
            if not line.startswith(_DATA):
                continue  # blank lines, comments and event names carry nothing here
            data = line[len(_DATA) :].strip()
            if data == _DONE:
                break
            self._take(orjson.loads(data))
        if not self._finished:
            raise _unavailable("the model endpoint ended its answer in the middle")

    def answer(self) -> ModelAnswer:
        """What the model answered."""
        return ModelAnswer(
            text="".join(self._text),
            calls=[_requested(call) for call in self._calls],
            input_tokens=int(self._usage.get("prompt_tokens") or 0),
            output_tokens=int(self._usage.get("completion_tokens") or 0),
            model=self._model,
        )

    def _take(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            raise _stream_error(chunk["error"])
        self._model = self._model or printable(str(chunk.get("model") or ""))
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content"):
                piece = printable(delta["content"])
                self._grow(piece)
                self._text.append(piece)
                self._emit(piece)
            for call in delta.get("tool_calls") or ():
                self._take_call(call)
            self._finished = self._finished or bool(choice.get("finish_reason"))

    def _take_call(self, delta: dict[str, Any]) -> None:
        """A piece of a tool call. Pieces belong together by index; endpoints that give all the same one differ in the
        id."""
        index = delta.get("index") or 0
        known = self._by_index.get(index)
        if known is None or (delta.get("id") and known["id"] and delta["id"] != known["id"]):
            known = {"id": "", "name": "", "arguments": ""}
            self._by_index[index] = known
            self._calls.append(known)
        function = delta.get("function") or {}
        known["id"] = known["id"] or str(delta.get("id") or "")
        known["name"] += function.get("name") or ""
        known["arguments"] += function.get("arguments") or ""
        self._grow(function.get("arguments") or "")

    def _grow(self, piece: str) -> None:
        self._size += len(piece)  # characters are at least as many bytes; the exact size is looked at in the end
        if self._size > self._max_bytes:
            raise reply_too_long(self._max_bytes)


def render_messages(request: ModelRequest) -> list[ChatCompletionMessageParam]:
    """The conversation as the protocol has it: instructions, what was said, this turn's inputs and the model's replies
    to them, each reply's calls with their results right behind it."""
    rendered: list[dict[str, Any]] = []
    if request.instructions:
        rendered.append({"role": "system", "content": request.instructions})
    rendered += map(_render_message, request.conversation.context())
    for entry in request.conversation.transcript():
        if isinstance(entry, message_pb2.Message):
            rendered.append(_render_message(entry))
        else:
            rendered.extend(_render_step(entry.number, entry.body))
    return cast(list[ChatCompletionMessageParam], rendered)


def _render_message(message: message_pb2.Message) -> dict[str, Any]:
    return {"role": _ROLES.get(message.role, "user"), "content": spoken(message)}


def _render_step(number: int, step: turn_pb2.StepBody) -> list[dict[str, Any]]:
    if is_interim(step):
        return [{"role": "assistant", "content": step.model_reply.text}]
    if step.WhichOneof("body") == "model_reply":
        reply = step.model_reply
        calls = [
            {
                "id": _call_id(call.call_id, number, call.index),
                "type": "function",
                "function": {"name": call.tool, "arguments": orjson.dumps(to_dict(call.arguments)).decode()},
            }
            for call in reply.tool_calls
        ]
        return [{"role": "assistant", "content": reply.text or None, "tool_calls": calls}]
    return [
        # The results of step n answer the calls of step n-1.
        {"role": "tool", "tool_call_id": _call_id(r.call_id, number - 1, r.index), "content": result_text(r)}
        for r in step.tool_results.results
    ]


def _call_id(given: str, step: int, index: int) -> str:
    """The model's own id of a call, or one made of its place where the model gave none."""
    return given or f"call_{step}_{index}"


def _render_tools(tools: Sequence[ToolDescription]) -> list[ChatCompletionToolUnionParam]:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": cast(dict[str, object], tool.parameters) or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def _headers(origin: CallOrigin) -> dict[str, str]:
    """Names the call, so that the other side can count calls and join traces."""
    headers = {
        "Soma-Turn": origin.turn_id.hex(),
        "Soma-Step": str(origin.step),
        "Soma-Dispatch": str(origin.dispatch),
        "Soma-Attempt": str(origin.attempt),
    }
    if origin.traceparent:
        headers["traceparent"] = origin.traceparent
    return headers


def _requested(call: dict[str, str]) -> RequestedCall:
    return RequestedCall(printable(call["id"]), printable(call["name"]), _arguments(call["arguments"]))


def _arguments(text: str) -> dict[str, Json] | None:
    """The arguments a model wrote, or None if they are no JSON object."""
    try:
        parsed = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _address(client: openai.AsyncOpenAI) -> str:
    """`host:port` of the endpoint, without what else its address may hold: credentials, a path, a query."""
    url = client.base_url
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{host}:{url.port or (443 if url.scheme == 'https' else 80)}"


def _error_of(error: openai.APIError) -> SomaError:
    """The error of a call that got no answer. It reaches tenants: it names no address, and what the libraries say
    may.
    """
    cause = error.__cause__ or error
    metadata = {"cause": type(cause).__name__}
    if isinstance(error, openai.APITimeoutError) and not isinstance(cause, httpx2.ConnectTimeout):
        text = "the model endpoint did not begin to answer in time"
        return _fail(reasons.ERROR_REASON_MODEL_TIMEOUT, text, metadata)
    in_time = " in time" if isinstance(error, openai.APITimeoutError) else ""
    text = (
        f"the model endpoint cannot be reached{in_time}; check SOMA_OPENAI_BASE_URL, the brain's log says where it is"
    )
    return _fail(reasons.ERROR_REASON_MODEL_UNAVAILABLE, text, metadata)


def _status_error(error: openai.APIStatusError) -> SomaError:
    status = error.status_code
    metadata = {"http_status": str(status)}
    said = _quote(error.message)
    if status in (401, 403):
        # Its own words are not passed on: endpoints quote the key.
        text = f"the model endpoint refused the credentials (HTTP {status}); check SOMA_OPENAI_API_KEY"
        return _fail(reasons.ERROR_REASON_MODEL_UNAUTHENTICATED, text, metadata)
    if status == 429:
        text = f"the model endpoint limits the rate: {said}"
        return _fail(reasons.ERROR_REASON_MODEL_RATE_LIMITED, text, metadata, _retry_after_s(error.response))
    if status >= 500 or status in (408, 409):
        text = f"the model endpoint failed with HTTP {status}: {said}"
        return _fail(reasons.ERROR_REASON_MODEL_UNAVAILABLE, text, metadata, _retry_after_s(error.response))
    if _is_context_too_long(error.code, error.message):
        text = f"the conversation is longer than the model takes; lower the agent's context_messages: {said}"
        return _fail(reasons.ERROR_REASON_CONTEXT_TOO_LONG, text, metadata)
    text = f"the model endpoint refused the request with HTTP {status}; check the agent's model and limits: {said}"
    return _fail(reasons.ERROR_REASON_MODEL_REJECTED, text, metadata)


def _stream_error(error: object) -> SomaError:
    """An error the endpoint sends as an event, after a good status."""
    details = error if isinstance(error, dict) else {}
    said = _quote(str(details.get("message") or error))
    code = str(details.get("code") or details.get("type") or "")
    if "rate_limit" in code or code == "429":
        return _fail(reasons.ERROR_REASON_MODEL_RATE_LIMITED, f"the model endpoint limits the rate: {said}")
    if _is_context_too_long(code, said):
        return _fail(reasons.ERROR_REASON_CONTEXT_TOO_LONG, f"the conversation is longer than the model takes: {said}")
    return _unavailable(f"the model endpoint failed in the middle of its answer: {said}")


def _is_context_too_long(code: str | None, message: str) -> bool:
    words = f"{code or ''} {message}".lower()
    return any(word in words for word in _CONTEXT_WORDS)


def _retry_after_s(response: httpx2.Response) -> float | None:
    """The wait the endpoint asks for, in seconds, a day at most; dates, which hardly any sends, are not read."""
    try:
        asked_s = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return None if math.isnan(asked_s) else min(max(0.0, asked_s), _MAX_RETRY_AFTER_S)


def _quote(said: str) -> str:
    return printable(said)[:_MAX_QUOTED]


def _unavailable(text: str) -> SomaError:
    return _fail(reasons.ERROR_REASON_MODEL_UNAVAILABLE, text)


def _fail(
    reason: Reason, text: str, metadata: dict[str, str] | None = None, retry_delay_s: float | None = None
) -> SomaError:
    return class_of(reason)(reason, text, metadata, retry_delay_s)
