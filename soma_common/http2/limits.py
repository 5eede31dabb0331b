"""What a peer may have, and make grow."""

from typing import Final

STREAM_WINDOW: Final = 1024 * 1024
"""What a peer may send on a stream beyond what was credited; half of it may lie unread before credit ends."""
CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""For all streams together: large enough that one which nobody reads leaves room for the others."""
MAX_UNREAD: Final = 128 * 1024 * 1024
"""Bytes of all streams that may lie unread or wait for the rest of their message, before the connection's credit ends.
"""
MAX_PARTS: Final = MAX_UNREAD * 3 // 4
"""Of these, bytes that wait for the rest of their message. Only more bytes can make an end of them, so that beyond this
the stream with the most of them is reset when credit ends."""
MAX_STREAMS: Final = 10_000
MAX_HEADER_BYTES: Final = 32 * 1024 * 1024
"""Decoded headers of the requests of all open streams, counted as RFC 9113, 6.5.2 does. They are kept as long as their
calls live, and a block of a few bytes that refers to HPACK's table makes 64 KiB of them. `MAX_STREAMS` calls fit, each
with a token of 2 KiB and 1 KiB beside it."""
MAX_FRAME: Final = 64 * 1024
MAX_UNREAD_ANSWERS: Final = 4 * 1024 * 1024
"""Bytes that a peer may leave unread while it still asks for answers (pings, settings, requests that are refused)."""
MAX_WASTED: Final = 2_000
"""What may come to nothing within `SPELL_S`: streams that were opened in it and reset, by the peer (CVE-2023-44487) or
because of what it did (CVE-2025-8671); requests that are refused; DATA that is empty and ends nothing (CVE-2019-9518);
frames on streams that are over."""
MAX_SETTINGS_FRAMES: Final = 20
"""Within `SPELL_S`: each may change the window of every stream."""
SPELL_S: Final = 1.0
MAX_FRAGMENTS: Final = 64
"""Frames that a header block may come in (CVE-2024-27983 and others)."""
CLOSE_S: Final = 5.0
"""How long the last words may take to leave."""
MAX_DISCARDED: Final = 1024 * 1024
"""Bytes that are read meanwhile for nothing."""
REMEMBERED: Final = 4 * 1024
"""Streams that are over, to tell the peer what is wrong with HEADERS on one."""
MAX_OWN_RESETS: Final = MAX_STREAMS
"""Streams that this end has reset, to tell what was still under way on them from what is wrong: all that are open may
be reset at once."""
