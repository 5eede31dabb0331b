"""A stand-in for a service: it serves gRPC health where the stack says, and behaves badly when told to.

STAND_IN=slow-stop    takes three times as long to stop as it may
STAND_IN=bad-settings ends at once, as a service with bad settings does
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


async def main() -> None:
    behaviour = os.environ.get("STAND_IN", "")
    if behaviour == "bad-settings":
        sys.stderr.write("SOMA_LISTEN: nonsense\n")
        sys.exit(2)
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(os.environ["SOMA_LISTEN"])
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    Path(os.environ["SOMA_LOG_FILE"]).write_text('{"level":"info","event":"service.ready"}\n')
    await stop.wait()
    if behaviour == "slow-stop":
        await asyncio.sleep(3 * float(os.environ["SOMA_STOP_TIMEOUT_S"]))
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
