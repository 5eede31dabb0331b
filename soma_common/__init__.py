"""The shared library: what every service needs and no service owns."""

import os
import sys

# gRPC reads this once, when it is imported, so it is said here and not in a setting. Its newer engine hands each
# received packet from thread to thread (6 switches for a message and its answer, none without it), which costs a fifth
# of a frame here and 0.3 ms of a turn. A value from outside wins.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")

# structlog imports rich if it is there, for tracebacks in colour, and rich imports pygments and attrs: 3 MB of each
# process of a mesh, for what its logs never show. It is there for the tables of the command line, which import it
# themselves; a module that is None in here counts as not installed.
if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog as structlog

    del sys.modules["rich"]
