"""A gateway on a real NATS server and a real gRPC socket, between a scripted control plane and a scripted router."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from soma.common.v1.message_pb2 import Error, Message, Part, Role
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest, WatchConfigResponse
from soma.controlplane.v1.config_service_pb2_grpc import ConfigServiceServicer, add_ConfigServiceServicer_to_server
from soma.controlplane.v1.tenant_service_pb2 import Tenant
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, ConnectResponse, Hello, InboundMessage
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub
from soma.router.v1.inbound_pb2 import InBatch, Inbound
from soma.router.v1.outbound_pb2 import (
    AckBatch,
    AdapterStream,
    Handover,
    LiveBatch,
    LiveHandover,
    OutBatch,
    Presence,
    Return,
    WatchQuery,
    WatchSnapshot,
)

from services.gateway.main import main
from services.gateway.settings import GatewaySettings
from soma_common import ids
from soma_common.grpc.channel import open_channel
from soma_common.layout import LaneLayout
from soma_common.lifecycle import Lifecycle
from soma_common.nats import subjects
from soma_common.nats.lanes import ensure_lanes, stream_name
from soma_common.testing.auth import Identities
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually
from tests.streams import write

if TYPE_CHECKING:
    from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceAsyncStub

TENANT, AGENT, CHANNEL = "demo", "echo", "line"
PARTITIONS = 8


class ControlPlane(ConfigServiceServicer):
    """Feeds tenants `demo`, `other` and `asleep` (suspended) with an agent each."""

    def __init__(self) -> None:
        self._changes: list[asyncio.Queue[WatchConfigResponse]] = []
        self.tenants = [Tenant(name="tenants/demo"), Tenant(name="tenants/other")]
        self.tenants.append(Tenant(name="tenants/asleep", suspended=True))
        self.agents = [Agent(name=f"tenants/{tenant}/agents/echo") for tenant in ("demo", "other", "asleep")]
        self.agents.append(Agent(name="tenants/demo/agents/paused", spec=AgentSpec(suspended=True)))

    async def WatchConfig(self, request: WatchConfigRequest, context: object) -> AsyncIterator[WatchConfigResponse]:
        changes: asyncio.Queue[WatchConfigResponse] = asyncio.Queue()
        self._changes.append(changes)
        yield WatchConfigResponse(snapshot=True, complete=True, tenants=self.tenants, agents=self.agents, version=1)
        while True:
            yield await changes.get()

    def push(self, change: WatchConfigResponse) -> None:
        for changes in self._changes:
            changes.put_nowait(change)


class Router:
    """The other side of the gateway on NATS. Its own view of the lane is what JetStream has stored."""

    def __init__(self, nc: Client, name: str = "router-1") -> None:
        self.nc = nc
        self.name = name
        self.acks: list[bytes] = []
        self.returns: list[Return] = []
        self.presence: dict[tuple[str, str], Presence] = {}
        self.announced: list[tuple[str, Presence]] = []
        self.queries: list[WatchQuery] = []
        self.snapshot: WatchSnapshot | None = WatchSnapshot()
        self.positions: dict[str, int] = {}
        self.seen: set[bytes] = set()
        self.answers: list[Delivery] = []
        self._deliver = True

    async def start(self) -> None:
        await self.nc.subscribe(f"soma.*.ack.{self.name}", cb=self._on_acks)
        await self.nc.subscribe("soma.*.presence.*", cb=self._on_presence)
        await self.nc.subscribe("soma.*.watch.*", cb=self._on_watch)
        await self.nc.flush()

    async def echo(self, *, deliver: bool = True) -> None:
        """From now on answers each message with its own text; without `deliver` the test hands the answers over."""
        self._deliver = deliver
        await self.nc.subscribe("soma.*.in.*", cb=self._on_inbound)
        await self.nc.flush()

    async def stored(self, lane: int = 0) -> list[tuple[str, Inbound]]:
        """What the lane holds, in order, with the subjects' tenants."""
        js = self.nc.jetstream()
        state = (await js.stream_info(stream_name(lane))).state
        items: list[tuple[str, Inbound]] = []
        for sequence in range(state.first_seq, state.last_seq + 1):
            raw = await js.get_msg(stream_name(lane), sequence)
            batch = InBatch.FromString(raw.data or b"")
            assert raw.subject == subjects.inbound(batch.tenant, lane)
            items += [(batch.tenant, item) for item in batch.items]
        return items

    async def sessions(self) -> list[str]:
        return [item.session for _, item in await self.stored()]

    async def stream(self, instance: str, tenant: str = TENANT, timeout_s: float = 5.0) -> tuple[str, AdapterStream]:
        """The announced stream of an adapter instance, with its gateway: the newest, once there is one."""

        def find() -> list[tuple[str, AdapterStream]]:
            found = [
                (gateway, stream)
                for (of, gateway), presence in self.presence.items()
                if of == tenant
                for stream in presence.streams
                if stream.instance == instance
            ]
            return sorted(found, key=lambda entry: entry[1].stream)

        return (await eventually(find, timeout_s))[-1]

    async def hand_over(self, gateway: str, stream: int, *deliveries: Delivery, tenant: str = TENANT) -> None:
        batch = OutBatch(router=self.name, deliveries=[Handover(stream=stream, delivery=d) for d in deliveries])
        await self.nc.publish(subjects.outbound(tenant, gateway), batch.SerializeToString())

    async def hand_live(self, gateway: str, stream: int, *events: LiveEvent, tenant: str = TENANT) -> None:
        batch = OutBatch(router=self.name, live=[LiveHandover(stream=stream, event=e) for e in events])
        await self.nc.publish(subjects.outbound(tenant, gateway), batch.SerializeToString())

    async def tell(self, session: str, *events: LiveEvent) -> None:
        """Live events for watchers."""
        session_id = ids.session_id(TENANT, AGENT, CHANNEL, session)
        await self.nc.publish(subjects.live(TENANT, session_id), LiveBatch(events=events).SerializeToString())

    async def _on_acks(self, message: Msg) -> None:
        batch = AckBatch.FromString(message.data)
        self.acks += batch.acks
        self.returns += batch.returns

    async def _on_presence(self, message: Msg) -> None:
        presence = Presence.FromString(message.data)
        tenant = subjects.tenant_of(message.subject)
        self.presence[tenant, presence.gateway] = presence
        self.announced.append((tenant, presence))

    async def _on_watch(self, message: Msg) -> None:
        self.queries.append(WatchQuery.FromString(message.data))
        if self.snapshot is not None:
            await message.respond(self.snapshot.SerializeToString())

    async def _on_inbound(self, message: Msg) -> None:
        batch = InBatch.FromString(message.data)
        fresh = [item for item in batch.items if item.message_id not in self.seen]
        self.seen.update(item.message_id for item in fresh)
        answers = [self._answer(item) for item in fresh]
        self.answers += answers
        if self._deliver:
            stream, gateway = max(await eventually(lambda: self._streams_of(batch.tenant)))
            await self.hand_over(gateway, stream, *answers, tenant=batch.tenant)

    def _streams_of(self, tenant: str) -> list[tuple[int, str]]:
        return [(s.stream, gateway) for (t, gateway), p in self.presence.items() if t == tenant for s in p.streams]

    def _answer(self, item: Inbound) -> Delivery:
        self.positions[item.session] = position = self.positions.get(item.session, 0) + 1
        said = Message.FromString(item.content)
        return Delivery(
            delivery_id=ids.turn_id(item.session_id, item.message_id),
            turn_id=ids.turn_id(item.session_id, item.message_id),
            agent=item.agent,
            session=item.session,
            position=position,
            outcome=Outcome.OUTCOME_FINAL,
            message_ids=[item.message_id],
            message=said,
            attempt=1,
        )


class Adapter:
    """A raw Connect stream: frames out, frames in, nothing hidden."""

    def __init__(self, stub: "ChannelServiceAsyncStub", hello: Hello | None) -> None:
        self.call: Any = stub.Connect()
        self._hello = hello
        self.receipts: dict[int, bytes] = {}
        self.refusals: dict[int, Error] = {}
        self.order: list[int] = []
        self.deliveries: list[Delivery] = []
        self.live: list[LiveEvent] = []
        self.frames: list[ConnectResponse] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.ended = False
        self.paused = asyncio.Event()
        self.paused.set()
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        if self._hello is not None:
            await self.send(ConnectRequest(hello=self._hello))
        self._reader = asyncio.create_task(self._read())
        if self._hello is not None:
            await eventually(lambda: self.frames or self.ended)

    async def send(self, frame: ConnectRequest) -> None:
        """Sends a frame, unless the gateway has ended the stream: `error` says why it did."""
        await write(self.call, frame)

    async def say(self, *refs: int, session: str = "s", text: str = "hi", key: str | None = None) -> None:
        await self.send(ConnectRequest(messages=[inbound(ref, session, text, key=key or f"k{ref}") for ref in refs]))

    async def send_many(self, messages: Iterable[InboundMessage]) -> None:
        await self.send(ConnectRequest(messages=messages))

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self.call.cancel()
        await asyncio.gather(self._reader or asyncio.sleep(0), return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                await self.paused.wait()
                frame = await self.call.read()
                if frame is grpc.aio.EOF:
                    break
                self._take(frame)
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.ended = True

    def _take(self, frame: ConnectResponse) -> None:
        self.frames.append(frame)
        for receipt in frame.receipts:
            self.receipts[receipt.ref] = receipt.message_id
            self.order.append(receipt.ref)
        for refusal in frame.refusals:
            self.refusals[refusal.ref] = refusal.error
            self.order.append(refusal.ref)
        self.deliveries += frame.deliveries
        self.live += frame.live


class World:
    """Everything a test of the gateway touches."""

    def __init__(self, nats_server: FaultyNats, folder: Path, stack: AsyncExitStack) -> None:
        self.nats_server = nats_server
        self.identities = Identities(folder / "auth")
        self.control = ControlPlane()
        self.id_form = ids.IDS_BESIDE
        self._folder = folder
        self._stack = stack
        self._control_port = 0
        self.router: Router
        self.lifecycles: list[Lifecycle] = []

    async def start(self) -> None:
        control = grpc.aio.server()
        add_ConfigServiceServicer_to_server(self.control, control)
        self._control_port = control.add_insecure_port("127.0.0.1:0")
        await control.start()
        self._stack.push_async_callback(control.stop, None)
        self.router = await self.new_router("router-1")

    async def new_router(self, name: str) -> Router:
        nc = await nats.connect(
            self.nats_server.url,
            token=self.nats_server.token,
            reconnect_time_wait=0.05,
            max_reconnect_attempts=-1,
            error_cb=_quiet,
        )
        self._stack.push_async_callback(nc.close)
        router = Router(nc, name)
        await router.start()
        return router

    def settings(self, instance: str = "gateway-0", **changes: object) -> GatewaySettings:
        return GatewaySettings.model_validate(
            {
                "service_instance": instance,
                "nats_url": self.nats_server.url,
                "nats_token_file": self.nats_server.token_file,
                "controlplane_target": f"127.0.0.1:{self._control_port}",
                "auth_keys_file": self.identities.keys_file,
                "auth_service_token_file": self.identities.service_token_file("gateway"),
                "partitions": PARTITIONS,
                "drain_timeout_s": 1.0,
                **changes,
            }
        )

    async def make_lanes(self, settings: GatewaySettings) -> None:
        """What a router has done before the first gateway starts."""
        layout = LaneLayout(settings.partitions, settings.lanes, self.id_form)
        await ensure_lanes(self.router.nc.jetstream(), layout, settings.tenant_lane_batches)

    async def gateway(self, instance: str = "gateway-0", *, make_lanes: bool = True, **changes: object) -> str:
        """Starts a gateway in this process and returns its address."""
        lifecycle = Lifecycle()
        self.lifecycles.append(lifecycle)
        self._stack.push_async_callback(lifecycle.stop)
        settings = self.settings(instance, **changes)
        if make_lanes:
            await self.make_lanes(settings)
        port = await main(lifecycle, settings)
        return f"127.0.0.1:{port}"

    async def stub(self, target: str, tenant: str = TENANT, ttl_s: float = 3600) -> "ChannelServiceAsyncStub":
        token = self.identities.token("adapter", tenant, ["channel"], ttl_s)
        channel = open_channel(target, token=lambda: token, service="gateway")
        self._stack.push_async_callback(channel.close)
        return ChannelServiceStub(channel)

    async def adapter(
        self,
        target: str,
        instance: str = "a",
        *,
        tenant: str = TENANT,
        credit: int = 16,
        live: bool = False,
        processed: Iterable[bytes] = (),
        ttl_s: float = 3600,
        hello: bool = True,
    ) -> Adapter:
        stub = await self.stub(target, tenant, ttl_s)
        adapter = Adapter(
            stub,
            Hello(
                tenant=tenant,
                channel=CHANNEL,
                instance=instance,
                credit=credit,
                live=live,
                protocol=1,
                processed=processed,
            )
            if hello
            else None,
        )
        self._stack.push_async_callback(adapter.close)
        await adapter.open()
        return adapter


async def _quiet(_error: Exception) -> None:
    """Connection errors are what these tests are about."""


@asynccontextmanager
async def running_world(nats_server: FaultyNats, folder: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(nats_server, folder, stack)
        await world.start()
        yield world


def inbound(ref: int, session: str = "s", text: str = "hi", *, key: str = "k", agent: str = AGENT) -> InboundMessage:
    return InboundMessage(ref=ref, agent=agent, session=session, idempotency_key=key, message=message(text))


def message(text: str) -> Message:
    return Message(role=Role.ROLE_USER, parts=[Part(text=text)])


def delivery(number: int, session: str = "s", position: int | None = None, text: str = "answer") -> Delivery:
    return Delivery(
        delivery_id=number.to_bytes(16, "big"),
        turn_id=number.to_bytes(16, "big"),
        agent=AGENT,
        session=session,
        position=position or number,
        outcome=Outcome.OUTCOME_FINAL,
        message=Message(role=Role.ROLE_ASSISTANT, parts=[Part(text=text)]),
        attempt=1,
    )
