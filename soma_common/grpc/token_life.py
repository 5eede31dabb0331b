"""How long a caller's token is good: streams outlive the check at their beginning."""

import base64
import json
import time
from typing import Any, Final

import grpc

LONGEST_S: Final = 30 * 24 * 3600.0
"""A stream ends by then even if its token is good for longer."""


def token_seconds_left(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    """How long the caller's token is still good, at most `LONGEST_S`. The guard has verified the token, so its claims
    are read as they are.
    """
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            claims = value.split(".")[1]
            expires: float = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["exp"]
            return min(max(expires - time.time(), 0.0), LONGEST_S)
    return LONGEST_S
