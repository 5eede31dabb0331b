"""What never reaches a log: secrets, and more of a payload than a person reads."""

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

REDACTED = "[redacted]"
TRUNCATED = "[truncated]"

MAX_VALUE_CHARS = 2000
"""Longest text value in a log line; `TRUNCATED` replaces the rest. Tracebacks: `MAX_TRACEBACK_CHARS`."""
MAX_TRACEBACK_CHARS = 20_000
MAX_DEPTH = 4
"""Deepest nesting that is written out."""

_SECRET_KEY = re.compile(r"authorization|token|password|passwd|secret|api_?key|credential|cookie", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?P<keep>bearer\s+)[\w.~+/=-]{8,}"  # an authorization header quoted in a message
    r"|(?P<keep2>://[^/\s:@]+:)[^@\s/]+(?=@)"  # the password of a URL
    r"|(?P<keep3>password=)[^\s&'\"]+"  # the password of a DSN
    r"|(?P<keep4>\bsk-)[\w-]{8,}"  # an API key of a model endpoint
    r"|eyJ[\w-]+\.eyJ[\w-]+\.[\w-]+",  # a JWT
    re.IGNORECASE,
)
_TRACEBACK_KEYS = frozenset({"exception", "stack"})


def clean_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Redact and cut all values of a log event (a structlog processor)."""
    for key, value in event.items():
        # Numbers under such keys are counts (`input_tokens`), and paths say only where the secret is kept.
        if isinstance(value, (str, bytes)) and _SECRET_KEY.search(key) and not key.endswith("_file"):
            event[key] = REDACTED
        elif isinstance(value, (int, float)) or value is None:
            continue
        else:
            event[key] = _clean(value, MAX_TRACEBACK_CHARS if key in _TRACEBACK_KEYS else MAX_VALUE_CHARS, 0)
    return event


def clean_text(text: str, limit: int = MAX_VALUE_CHARS) -> str:
    """Return `text` without secrets and cut to `limit` characters."""
    if len(text) > limit:
        text = text[:limit] + TRUNCATED
    return _SECRET_TEXT.sub(_keep_prefix, text)


def _keep_prefix(match: re.Match[str]) -> str:
    return next((kept for kept in match.groups() if kept is not None), "") + REDACTED


def _clean(value: object, limit: int, depth: int) -> object:
    if isinstance(value, str):
        return clean_text(value, limit)
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value[: limit // 2])
        return data.hex() + (TRUNCATED if len(value) > len(data) else "")
    if isinstance(value, (int, float)) or value is None:
        return value
    if depth >= MAX_DEPTH:
        return TRUNCATED
    if isinstance(value, Mapping):
        return {
            str(k): REDACTED
            if isinstance(v, (str, bytes)) and _SECRET_KEY.search(str(k))
            else _clean(v, limit, depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(item, limit, depth + 1) for item in value]
    return clean_text(str(value), limit)
