"""Tools behind HTTP endpoints, described by a file.

A call is one POST with the body `{"tool", "arguments", "session", "turn_id", "step"}` and the headers
`Idempotency-Key`, `Soma-Turn` and `Soma-Step`. An answer of 2xx is the result: JSON, or text. Any other answer is the
tool's error. Whether a call whose answer never came had its effect is not known; only for tools that may run again is
that an error like others.

Connections are not kept open: a kept one that the endpoint closes just then would leave the outcome of a call unknown
that it never got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import httpx2
import orjson
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter, ValidationError, field_validator

from services.toolgw.adapters.json_schema import check_schema
from services.toolgw.domain.invocation import Call
from services.toolgw.domain.outcome import MAX_RESULT_BYTES, TRUNCATED, Outcome, OutcomeUnknown, failed, never_begun
from services.toolgw.domain.tool import Effect, Json, ToolDefinition, ToolKind
from soma_common.ids import is_slug
from soma_common.settings import StartRefused

CONNECT_TIMEOUT_S: Final = 2.0
FILE_SETTING: Final = "SOMA_TOOLGW_HTTP_TOOLS_FILE"
"""What names the file: an error of the file is one of this setting for whoever starts the service."""
SHOWN_ERROR_BYTES: Final = 1000
"""How much of an endpoint's error answer the model is shown."""

_EFFECTS: Final = {
    "read_only": Effect.NONE,
    "idempotent": Effect.IDEMPOTENT,
    "side_effectful": Effect.SIDE_EFFECTFUL,
}
_NEVER_SENT: Final = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
"""Errors before the first byte of the request has left."""


class HttpToolsFileError(StartRefused):
    """The file of HTTP tools cannot be used; the text names the setting and says where and what to change."""


class HttpToolEntry(BaseModel):
    """One tool in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tool: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """What a model calls it."""
    description: str = Field(min_length=1, max_length=4096)
    """What it does, for the model."""
    parameters: dict[str, Json]
    """JSON Schema (2020-12) of the arguments."""
    side_effect: Literal["read_only", "idempotent", "side_effectful"]
    """What running it does to the world."""
    timeout_ms: int = Field(ge=1, le=600_000)
    """Longest run."""
    url: HttpUrl
    """Where it is."""
    tenants: frozenset[str] | None = None
    """The only tenants that have it; left out: all."""
    compensation: str | None = None
    """The tool of this file that undoes a call of this one; left out: nothing does."""

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: dict[str, Json]) -> dict[str, Json]:
        check_schema(value)
        return value

    @field_validator("tenants")
    @classmethod
    def _check_tenants(cls, value: frozenset[str] | None) -> frozenset[str] | None:
        wrong = sorted(tenant for tenant in value or () if not is_slug(tenant))
        if wrong:
            raise ValueError(f"{wrong} are no tenant ids")
        return value


class HttpTool:
    """A tool behind an endpoint."""

    def __init__(self, entry: HttpToolEntry, client: httpx2.AsyncClient) -> None:
        self._url = str(entry.url)
        self._client = client
        self.definition = ToolDefinition(
            name=entry.tool,
            description=entry.description,
            parameters=entry.parameters,
            effect=_EFFECTS[entry.side_effect],
            timeout_s=entry.timeout_ms / 1000,
            tenants=entry.tenants,
            kind=ToolKind.HTTP,
            compensation=entry.compensation or "",
        )

    async def run(self, call: Call) -> Outcome:
        """Result: what the endpoint answered. The time limit of the whole is the caller's."""
        session = {"tenant": call.tenant, "agent": call.agent, "channel": call.channel, "session": call.session}
        body = {
            "tool": call.tool,
            "arguments": call.arguments,
            "session": session,
            "turn_id": call.turn_id,
            "step": call.step,
        }
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/plain;q=0.5",
            "Accept-Encoding": "identity",  # A compressed answer could be small on the wire and huge in memory.
            "Idempotency-Key": call.key,
            "Soma-Turn": call.turn_id,
            "Soma-Step": str(call.step),
        }
        try:
            async with self._client.stream("POST", self._url, content=orjson.dumps(body), headers=headers) as response:
                return await _outcome_of(response)
        except _NEVER_SENT as error:
            return never_begun(f"{call.tool} cannot be reached", cause=type(error).__name__)
        except httpx2.TransportError as error:
            if not self.definition.effect.may_run_again:
                raise OutcomeUnknown(f"the connection was cut after the call was sent: {error!r}") from error
            return failed(f"the connection to {call.tool} was cut", cause=type(error).__name__)


def http_client() -> httpx2.AsyncClient:
    """The client that all HTTP tools share: no redirects, no proxies from the environment, no kept connections."""
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        follow_redirects=False,
        trust_env=False,
    )


def load_http_tools(file: Path, client: httpx2.AsyncClient) -> list[HttpTool]:
    """The tools that `file` describes: a JSON list of `HttpToolEntry`.

    Raises:
        HttpToolsFileError: it cannot be read, or an entry is wrong.
    """
    try:
        entries = TypeAdapter(list[HttpToolEntry]).validate_json(file.read_bytes())
    except OSError as error:
        text = f"{file} cannot be read: {error.strerror}; change {FILE_SETTING}, or unset it"
        raise HttpToolsFileError(text) from error
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise _wrong(file, [_placed(problem["loc"], problem["msg"]) for problem in problems]) from error
    problems_of_compensations = list(check_compensations(entries))
    if problems_of_compensations:
        raise _wrong(file, problems_of_compensations)
    return [HttpTool(entry, client) for entry in entries]


def _wrong(file: Path, problems: Sequence[str]) -> HttpToolsFileError:
    return HttpToolsFileError(f"{file} (named by {FILE_SETTING}) is no list of tools: {'; '.join(problems)}")


def _placed(place: tuple[int | str, ...], problem: str) -> str:
    """A problem behind its place, such as `0.url`; what is wrong with the file as a whole has none."""
    return f"{'.'.join(map(str, place))}: {problem}" if place else problem


def check_compensations(entries: Sequence[HttpToolEntry]) -> Iterator[str]:
    """What is wrong with the compensations that `entries` name, each with its place."""
    by_name = {entry.tool: entry for entry in entries}
    for place, entry in enumerate(entries):
        if entry.compensation is not None and (problem := _compensation_problem(entry, by_name)):
            yield f"{place}.compensation: {entry.compensation!r} {problem}"


def _compensation_problem(entry: HttpToolEntry, by_name: Mapping[str, HttpToolEntry]) -> str:
    """Why what `entry` names cannot undo its calls; empty: it can."""
    compensation = by_name.get(entry.compensation or "")
    if compensation is None:
        return "is no tool of this file"
    if "read_only" in (entry.side_effect, compensation.side_effect):
        return "undoes nothing: neither of the two may be read_only"
    if not {"arguments", "result"} <= compensation.parameters.get("properties", {}).keys():
        return "must have the parameters `arguments` and `result`"
    if not {"arguments", "result"}.issuperset(compensation.parameters.get("required", ())):
        return "must not require other parameters than `arguments` and `result`"
    if compensation.tenants is not None and not (entry.tenants or {"*"}) <= compensation.tenants:
        return f"is not there for each tenant that has {entry.tool!r}"
    return "undoes itself in the end: compensations must not go in a circle" if _is_in_circle(entry, by_name) else ""


def _is_in_circle(entry: HttpToolEntry, by_name: Mapping[str, HttpToolEntry]) -> bool:
    passed: set[str] = set()
    at: HttpToolEntry | None = entry
    while at is not None and at.tool not in passed:
        passed.add(at.tool)
        at = by_name.get(at.compensation or "")
    return at is not None


async def _outcome_of(response: httpx2.Response) -> Outcome:
    content = await _read(response)
    if not response.is_success:
        shown = content[:SHOWN_ERROR_BYTES].decode(errors="replace")
        cut = TRUNCATED if len(content) > SHOWN_ERROR_BYTES else ""
        return failed(f"it answered HTTP {response.status_code}: {shown}{cut}", http_status=str(response.status_code))
    if len(content) > MAX_RESULT_BYTES:
        shown = content[:SHOWN_ERROR_BYTES].decode(errors="replace")
        return failed(
            f"the result has more than {MAX_RESULT_BYTES} bytes; it begins: {shown}{TRUNCATED}",
            bound_bytes=str(MAX_RESULT_BYTES),
        )
    if not content:
        return Outcome(value=None)
    try:
        if "json" in response.headers.get("content-type", ""):
            return Outcome(value=orjson.loads(content))
        return Outcome(value=content.decode())
    except ValueError as error:
        return failed(f"it answered what it did not announce: {error}", http_status=str(response.status_code))


async def _read(response: httpx2.Response) -> bytes:
    """The answer's content, at most a chunk more than the largest result."""
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_RESULT_BYTES:
            break
    return bytes(content)
