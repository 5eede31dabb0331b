"""Ports and order of a stack's parts."""

import socket
from collections import Counter

import pytest

from soma_common.embedded.process import PartFailed
from somastack.layout import ADMIN_OFFSET, MAX_REPLICAS, SERVERS_STOP_RANK, SERVICES, SPAN, Layout, is_taken

FULL = Layout(20000, {service.name: MAX_REPLICAS for service in SERVICES})


def test_no_two_parts_share_a_port_even_with_all_replicas() -> None:
    counted = Counter(port for port, _ in FULL.ports())
    assert max(counted.values()) == 1
    assert all(20000 <= port < 20000 + SPAN for port in counted)


def test_a_port_is_the_base_plus_a_fixed_offset() -> None:
    layout = Layout(7400, {"router": 2})
    router = layout.instances("router")[1]
    assert (router.name, layout.grpc_port(router), layout.admin_port(router)) == ("router-1", 7421, 7421 + ADMIN_OFFSET)
    assert layout.targets("router") == "127.0.0.1:7420,127.0.0.1:7421"
    assert layout.targets("gateway") == "127.0.0.1:7400"


def test_whatever_a_service_starts_after_comes_before_it() -> None:
    seen = {"nats", "postgres"}
    for service in SERVICES:
        assert set(service.start_after) <= seen
        seen.add(service.name)


def test_all_stop_limits_together_stay_below_ten_seconds() -> None:
    ranks = {rank: [s.stop_timeout_s for s in SERVICES if s.stop_rank == rank] for rank in range(SERVERS_STOP_RANK)}
    servers_s = 3.0
    assert sum(max(limits) for limits in ranks.values()) + servers_s < 10.0


@pytest.mark.parametrize(
    ("base", "replicas", "said"),
    [
        (80, {}, "port base 80 is out of range"),
        (65500, {}, "port base 65500 is out of range"),
        (7400, {"brain": 2}, "there is no service brain"),
        (7400, {"router": 0}, "0 replicas of router are not possible"),
        (7400, {"router": 11}, "11 replicas of router are not possible"),
    ],
)
def test_an_impossible_layout_says_what_is_possible(base: int, replicas: dict[str, int], said: str) -> None:
    with pytest.raises(PartFailed, match=said) as refused:
        Layout(base, replicas)
    assert refused.value.advice


def test_a_taken_port_is_seen_although_its_owner_shares_it() -> None:
    """gRPC servers bind with SO_REUSEPORT: a second one would start without complaint."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert is_taken(port)
    assert not is_taken(port)
