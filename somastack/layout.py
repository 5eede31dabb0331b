"""Which parts a standalone stack has, in which order they start and stop, and on which ports they listen.

Every port is the base (default 7400) plus a fixed offset, so a second stack needs only another base:

| offset     | what                                                                |
|------------|---------------------------------------------------------------------|
| 0-9        | gateway-0 ... gateway-9, gRPC                                       |
| 10-19      | controlplane, gRPC                                                  |
| 20-29      | router, gRPC                                                        |
| 30-39      | cognition, gRPC                                                     |
| 40-49      | toolgw, gRPC                                                        |
| 50, 51     | NATS clients, NATS monitoring pages                                 |
| 100-149    | admin pages (/metrics, /health/live, /health/ready): 100 + the gRPC offset |

Everything listens on 127.0.0.1 only. PostgreSQL has a Unix socket and no port.
"""

import errno
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from soma_common.embedded.process import PartFailed

HOST = "127.0.0.1"
DEFAULT_BASE = 7400
MAX_REPLICAS = 10
SPAN = 150
"""Ports from the base that belong to one stack."""
NATS_OFFSET, NATS_MONITOR_OFFSET, ADMIN_OFFSET = 50, 51, 100
SERVERS = ("nats", "postgres")


@dataclass(frozen=True)
class Service:
    """One of the five services."""

    name: str
    offset: int
    """Of its first replica's gRPC port from the base."""
    start_after: tuple[str, ...]
    """Parts that must be ready before it starts the first time. It survives their later restarts by itself."""
    stop_rank: int
    """Lower ranks stop first: whoever takes work in stops before whoever does it."""
    stop_timeout_s: float
    """How long it may take to finish what it has in hand. The ranks' limits together stay below ten seconds."""


SERVICES = (
    Service("controlplane", 10, start_after=SERVERS, stop_rank=3, stop_timeout_s=1.0),
    Service("toolgw", 40, start_after=SERVERS, stop_rank=2, stop_timeout_s=1.5),
    Service("cognition", 30, start_after=SERVERS, stop_rank=2, stop_timeout_s=1.5),
    Service("router", 20, start_after=("controlplane", "toolgw", "cognition"), stop_rank=1, stop_timeout_s=2.0),
    Service("gateway", 0, start_after=("controlplane",), stop_rank=0, stop_timeout_s=1.5),
)
SERVERS_STOP_RANK = 4


@dataclass(frozen=True)
class Instance:
    """One replica of a service."""

    service: Service
    number: int

    @property
    def name(self) -> str:
        """For example `router-0`."""
        return f"{self.service.name}-{self.number}"


@dataclass(frozen=True)
class Layout:
    """A stack's parts and ports."""

    base: int = DEFAULT_BASE
    replicas: Mapping[str, int] = field(default_factory=dict)
    """By service name; one of each by default."""

    def __post_init__(self) -> None:
        if not 1024 <= self.base <= 65536 - SPAN:
            raise PartFailed(f"port base {self.base} is out of range", f"choose one from 1024 to {65536 - SPAN}")
        for name, count in self.replicas.items():
            if name not in {service.name for service in SERVICES}:
                raise PartFailed(f"there is no service {name}", "name one of " + ", ".join(s.name for s in SERVICES))
            if not 1 <= count <= MAX_REPLICAS:
                raise PartFailed(f"{count} replicas of {name} are not possible", f"choose 1 to {MAX_REPLICAS}")

    def instances(self, service: str | None = None) -> list[Instance]:
        """Every replica, or those of one service, in the order of their start."""
        return [
            Instance(each, number)
            for each in SERVICES
            if service in (None, each.name)
            for number in range(self.replicas.get(each.name, 1))
        ]

    def grpc_port(self, instance: Instance) -> int:
        """Where the instance serves gRPC."""
        return self.base + instance.service.offset + instance.number

    def admin_port(self, instance: Instance) -> int:
        """Where the instance serves its admin pages."""
        return self.grpc_port(instance) + ADMIN_OFFSET

    def targets(self, service: str) -> str:
        """The gRPC addresses of every replica of `service`, separated by commas."""
        return ",".join(f"{HOST}:{self.grpc_port(instance)}" for instance in self.instances(service))

    @property
    def nats_port(self) -> int:
        """Where NATS serves its clients."""
        return self.base + NATS_OFFSET

    @property
    def nats_monitor_port(self) -> int:
        """Where NATS serves its monitoring pages."""
        return self.base + NATS_MONITOR_OFFSET

    def ports(self) -> Iterator[tuple[int, str]]:
        """Every port the stack listens on, with what listens there."""
        yield self.nats_port, "nats"
        yield self.nats_monitor_port, "nats monitoring"
        for instance in self.instances():
            yield self.grpc_port(instance), instance.name
            yield self.admin_port(instance), f"{instance.name} admin"

    def refuse_taken_ports(self) -> None:
        """Raise when something else already listens where the stack is going to.

        Asked before anything starts: gRPC servers share a port silently with each other (SO_REUSEPORT).

        Raises:
            PartFailed: naming the port, what it is for, and what to do.
        """
        for port, purpose in self.ports():
            if is_taken(port):
                raise PartFailed(
                    f"port {port} (for {purpose}) is taken by another program",
                    f"stop that program, or choose other ports: --port-base {self._free_base()}",
                )

    def _free_base(self) -> int:
        """A base all of whose ports are free now."""
        for base in range(self.base + 200, 65536 - SPAN, 200):
            if not any(is_taken(port) for port, _ in Layout(base, self.replicas).ports()):
                return base
        return self.base + 200


def is_taken(port: int) -> bool:
    """Whether something on this machine holds the loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that lingers from an earlier run does not take the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return True
            raise
    return False
