"""Settings of the gateway that do not fit each other are told by their names, before anything is started."""

import pytest
from soma.common.v1.message_pb2 import Message, Part
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, InboundMessage, Nack

from services.gateway.settings import BESIDE_BYTES, GATHERED_BYTES, GatewaySettings
from soma_common.client import channel_client as kit
from soma_common.settings import EXIT_BAD_SETTINGS, load_settings

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("grpc_max_message_bytes", "max_content_bytes", "needed"),
    [(4 * MIB - 1, 256 * 1024, 4 * MIB), (64 * 1024, 1024, 4 * MIB), (10 * MIB - 1, 8 * MIB, 10 * MIB)],
)
def test_frames_that_a_content_may_need_and_gRPC_would_refuse_end_the_start(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    grpc_max_message_bytes: int,
    max_content_bytes: int,
    needed: int,
) -> None:
    monkeypatch.setenv("SOMA_MAX_BATCH_BYTES", str(16 * MIB))
    monkeypatch.setenv("SOMA_MAX_CONTENT_BYTES", str(max_content_bytes))
    monkeypatch.setenv("SOMA_GRPC_MAX_MESSAGE_BYTES", str(grpc_max_message_bytes))
    with pytest.raises(SystemExit) as ended:
        load_settings(GatewaySettings)
    assert ended.value.code == EXIT_BAD_SETTINGS
    _, told = capsys.readouterr().err.splitlines()
    assert f"SOMA_GRPC_MAX_MESSAGE_BYTES must be at least {needed}, it is {grpc_max_message_bytes}: " in told

    monkeypatch.setenv("SOMA_GRPC_MAX_MESSAGE_BYTES", str(needed))
    assert load_settings(GatewaySettings).grpc_max_message_bytes == needed


@pytest.mark.parametrize("large", [True, False], ids=["one large message", "many small ones"])
def test_the_kits_fullest_frame_has_room(large: bool) -> None:
    """Beyond that the gateway would end the stream, and the kit would send the frame again, for ever."""
    count, size = (1, kit.MAX_CONTENT_BYTES) if large else (kit.MAX_FRAME_ITEMS, kit.MAX_FRAME_BYTES)
    item = InboundMessage(
        ref=2**32,
        agent="a" * kit.MAX_NAMES_BYTES if large else "",
        message=Message(parts=[Part(text="x" * (size // count))]),
    )
    nack = Nack(delivery_id=b"d" * 16, delay_ms=2**31, cause="\N{GRINNING FACE}" * 1024)
    frame = ConnectRequest(
        messages=[item] * count,
        acks=[b"d" * 16] * kit.MAX_FRAME_ACKS,
        nacks=[nack] * kit.MAX_FRAME_NACKS,
        credit=65_536,
    )
    assert frame.ByteSize() <= max(size, GATHERED_BYTES) + BESIDE_BYTES
    assert kit.MAX_FRAME_BYTES <= GATHERED_BYTES
