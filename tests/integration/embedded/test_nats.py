"""The embedded NATS server: what survives its death, and who may connect."""

import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nats
import pytest

from soma_common.embedded.nats import NatsConfig, NatsServer
from soma_common.embedded.process import PartFailed
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually


async def test_acknowledged_messages_survive_kill_9(nats_server: FaultyNats) -> None:
    client = await nats.connect(nats_server.url, token=nats_server.token, reconnect_time_wait=0.02, error_cb=_ignore)
    stream = client.jetstream()
    await stream.add_stream(name="KEPT", subjects=["kept.>"])
    for number in range(20):
        await stream.publish(f"kept.{number}", b"x")
    url = nats_server.url

    await nats_server.kill9()
    await nats_server.start()

    assert nats_server.url == url
    assert (await stream.stream_info("KEPT")).state.messages == 20
    await client.close()


async def test_a_frozen_server_fails_its_check_and_wakes(
    nats_server: FaultyNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_common.embedded.nats.CHECK_TIMEOUT_S", 0.3)
    nats_server.sigstop()
    with pytest.raises(TimeoutError):
        await nats_server.check()
    nats_server.sigcont()
    await nats_server.check()


async def test_a_server_that_could_not_write_fails_its_check_until_it_is_started_anew(tmp_path: Path) -> None:
    """Also when there is room again: the stream refuses everything, and a client sees only silence."""
    server = FaultyNats(NatsConfig(tmp_path / "nats", monitor_port=free_port()))
    await server.start()
    client = await nats.connect(server.url, token=server.token, reconnect_time_wait=0.02, error_cb=_ignore)
    stream = client.jetstream(timeout=0.5)
    await stream.add_stream(name="KEPT", subjects=["kept"])
    await server.check()
    with no_room(server.process.pid), pytest.raises(nats.errors.TimeoutError):
        await stream.publish("kept", b"x")
    with pytest.raises(ConnectionError, match="write error"):
        await server.check()
    await server.restart()
    await server.check()
    await eventually(lambda: client.is_connected)
    await stream.publish("kept", b"y")
    await client.close()
    await server.stop()


async def test_a_stranger_without_the_token_is_refused(nats_server: FaultyNats, tmp_path: Path) -> None:
    stranger = NatsServer(NatsConfig(tmp_path, port=nats_server.port))
    stranger.token_file.write_text("guess")
    with pytest.raises(ConnectionError, match="Authorization Violation"):
        await stranger.check()


async def test_token_and_configuration_are_private(nats_server: FaultyNats) -> None:
    for path in (nats_server.token_file, nats_server.token_file.with_name("server.json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_taken_port_is_told(nats_server: FaultyNats, tmp_path: Path) -> None:
    with pytest.raises(PartFailed, match="address already in use"):
        await NatsServer(NatsConfig(tmp_path / "second", port=nats_server.port)).start()


@contextmanager
def no_room(pid: int) -> Iterator[None]:
    """For a process, all disks are full: no file of its grows."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _ignore(_: Exception) -> None:
    return
