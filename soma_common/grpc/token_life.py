"""How long a caller's token is good: streams outlive the check at their beginning."""

import time
from typing import Final

from soma_common.grpc.call_context import caller

LONGEST_S: Final = 30 * 24 * 3600.0
"""A stream ends by then even if its token is good for longer."""


def token_seconds_left() -> float:
    """How long the token of the caller of this task's call is still good, at most `LONGEST_S`."""
    return min(max(caller().expires - time.time(), 0.0), LONGEST_S)
