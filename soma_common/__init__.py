"""The shared library: what every service needs and no service owns."""

import os

# gRPC reads this once, when it is imported, so it is said here and not in a setting. Its newer engine hands each
# received packet from thread to thread (6 switches for a message and its answer, none without it), which costs a fifth
# of a frame here and 0.3 ms of a turn. A value from outside wins.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")
