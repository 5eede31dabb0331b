"""A server in a process of its own, for tests that freeze it: prints its port and serves until killed.

Argument: the folder of the identities it accepts.
"""

import asyncio
import sys
from pathlib import Path

from soma.toolgw.v1.tool_service_pb2_grpc import add_ToolServiceServicer_to_server

from soma_common.authz.authorizer import Authorizer
from soma_common.authz.engine import default_engine
from soma_common.authz.tokens import TokenVerifier
from soma_common.grpc.server import GrpcServer
from soma_common.settings import ServiceSettings
from tests.integration.soma_common.conftest import Tools


async def main(folder: Path) -> None:
    tools = Tools()  # type: ignore[abstract] # what is not called is not written
    server = GrpcServer(
        ServiceSettings(service_instance="toolgw-0"),
        Authorizer(TokenVerifier(folder / "keys.json"), default_engine()),
        services=[(add_ToolServiceServicer_to_server, tools, "soma.toolgw.v1.ToolService")],
    )
    port = await server.start()
    await server.set_serving(True)
    print(port, flush=True)
    await asyncio.Event().wait()


asyncio.run(main(Path(sys.argv[1])))
