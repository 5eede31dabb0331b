"""A service without a purpose, to test what surrounds every service. Environment variables `PROBE_*` steer it."""

import asyncio
import logging
import os
import time

import structlog

from soma_common.failpoints import failpoint_async
from soma_common.lifecycle import Lifecycle, run_service
from soma_common.patience import patiently
from soma_common.postgres.connect import connect
from soma_common.settings import ServiceSettings, StartRefused, load_settings
from soma_common.telemetry.admin import serve_admin

_log = structlog.get_logger(__name__)


def ready() -> dict[str, bool]:
    pairs = (pair.split("=") for pair in os.environ.get("PROBE_READY", "probe=1").split(","))
    return {name: value == "1" for name, value in pairs}


async def store_stop() -> None:
    _log.info("probe.step", step="store")


async def intake_stop() -> None:
    await asyncio.sleep(float(os.environ.get("PROBE_STOP_S", "0")))
    _log.info("probe.step", step="intake")


async def work() -> None:
    while True:
        await asyncio.sleep(0.02)
        await failpoint_async("probe.tick")
        if "PROBE_CRASH" in os.environ:
            raise RuntimeError("the probe's task fails")


def main() -> None:
    settings = load_settings(ServiceSettings)

    async def start(lifecycle: Lifecycle) -> None:
        _log.info("probe.starting")
        lifecycle.on_stop("store", store_stop)
        await asyncio.sleep(float(os.environ.get("PROBE_START_S", "0")))
        if "PROBE_FAIL_START" in os.environ:
            raise RuntimeError("the probe cannot start")
        if "PROBE_REFUSE_START" in os.environ:
            raise StartRefused("PROBE_REFUSE_START is set: unset it")
        if settings.postgres_dsn is not None:
            dsn = settings.postgres_dsn
            connection = await patiently(lambda: connect(dsn), settings.start_patience_s)
            lifecycle.on_stop("database", connection.close)
        logging.getLogger("some.library").warning("library says password=%s", "hunter2")
        _log.info("probe.secret", token="hunter2")
        admin = await serve_admin(settings, ready)
        lifecycle.on_stop("admin", admin.stop)
        lifecycle.on_stop("intake", intake_stop, timeout_s=60)
        lifecycle.ready(admin_port=admin.port)
        lifecycle.spawn("work", work())
        if "PROBE_STUCK_THREAD" in os.environ:
            await asyncio.to_thread(time.sleep, 60)

    run_service(start, settings)


if __name__ == "__main__":
    main()
