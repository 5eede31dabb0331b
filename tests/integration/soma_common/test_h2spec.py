"""The server against h2spec, others' suite for RFC 9113's predecessor and HPACK (`make tools` installs it)."""

import asyncio
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.integration.soma_common.conftest import Stack
from tests.integration.soma_common.h2_peer import CHECK, check

H2SPEC = Path(__file__).parents[3] / ".tools" / "bin" / "h2spec"
LIMIT_S = 170

_NO_PRIORITY = "RFC 9113 took priorities away: they are read and ignored"
_NO_BODY = "it asks by GET and waits for DATA: a call is made by POST, and a refusal need not have a body"
_NO_CALL = "its requests are no calls: they are refused at their headers, and what comes after is not looked at"
_LARGE_FRAMES = "it takes every frame above 2^14 for too large, whatever size the server's settings allow"

MAY_FAIL = {
    "generic/2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream": _NO_BODY,
    "generic/2: Sends a PRIORITY frame on half-closed (remote) stream": _NO_BODY,
    "http2/4.2: Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE": _LARGE_FRAMES,
    "http2/5.1: closed: Sends a DATA frame after sending RST_STREAM frame": _NO_CALL,
    "http2/5.1: closed: Sends a HEADERS frame after sending RST_STREAM frame": _NO_CALL,
    "http2/5.1.2: Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded": _NO_CALL,
    "http2/5.3.1: Sends HEADERS frame that depend on itself": _NO_PRIORITY,
    "http2/5.3.1: Sends PRIORITY frame that depend on itself": _NO_PRIORITY,
    "http2/6.9.1: Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1 on a stream": (
        _NO_CALL
    ),
    "http2/8.1: Sends a second HEADERS frame without the END_STREAM flag": _NO_CALL,
    "http2/8.1.2.1: Sends a HEADERS frame that contains a pseudo-header field as trailers": _NO_CALL,
    'http2/8.1.2.6: Sends a HEADERS frame with the "content-length" header field which does not equal the DATA frame '
    "payload length": _NO_CALL,
    'http2/8.1.2.6: Sends a HEADERS frame with the "content-length" header field which does not equal the sum of the '
    "multiple DATA frames payload length": _NO_CALL,
}
"""What h2spec asks for and a server need not do, with the reason."""


def failures(report: Path) -> dict[str, str]:
    """Return what failed, as `<suite>/<section>: <what was done>`, with what h2spec saw."""
    found = {}
    for suite in ET.parse(report).getroot().iter("testsuite"):
        for case in suite.iter("testcase"):
            bad = [problem for kind in ("failure", "error") for problem in case.iter(kind)]
            if bad:
                told = "; ".join(" ".join("".join(problem.itertext()).split()) for problem in bad)
                if "Connection closed" in told and told.endswith("connection reset by peer"):
                    continue  # It asked for the connection's end and does not know it by this name.
                found[f"{case.get('package')}: {case.get('classname')}"] = told
    return found


def cases(report: Path) -> int:
    return sum(1 for _ in ET.parse(report).getroot().iter("testcase"))


@pytest.mark.timeout(LIMIT_S + 30)
async def test_h2spec_finds_no_fault(stack: Stack, tmp_path: Path) -> None:
    if not H2SPEC.exists():
        if os.environ.get("CI") == "true" and shutil.which("go"):
            pytest.fail("there is Go but no h2spec: make tools says why")
        # Elsewhere nothing but Python and make may be needed: Go may be missing, too old, or cut off from its modules.
        pytest.skip("h2spec is not built here, CI requires it; with Go: make tools")
    report = tmp_path / "h2spec.xml"
    port = str(stack.server.port)
    command = ("-h", "127.0.0.1", "-p", port, "-P", CHECK, "-o", "1", "-j", str(report), "generic", "http2", "hpack")
    process = await asyncio.create_subprocess_exec(
        H2SPEC, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert report.exists(), output.decode(errors="replace")
    assert cases(report) > 140, "h2spec ran only a part"
    unexplained = {what: told for what, told in failures(report).items() if what not in MAY_FAIL}
    assert not unexplained, "\n".join(f"{what}\n    {told}" for what, told in unexplained.items())
    await check(stack.server.port)
