"""Whether the server lives, and whether it can do its work."""

from __future__ import annotations

import logging
import uuid

from fastapi import APIRouter, Response

from fedra_edge.protocol import routes
from fedra_edge.protocol.messages import Health
from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_server import __version__
from fedra_server.errors import StorageError
from fedra_server.expecting import largest_expected_bytes
from fedra_server.http.mounting import mount
from fedra_server.http.services import Services, ServicesHere

logger = logging.getLogger(__name__)
router = APIRouter(tags=["health"])


@mount(router, routes.LIVE)
async def live() -> Health:
    """Say that the process answers."""
    return Health(status="ok", version=__version__, protocol=PROTOCOL_VERSION)


@mount(
    router,
    routes.READY,
    responses={503: {"model": Health, "description": "The server cannot do its work now."}},
)
def ready(services: ServicesHere, response: Response) -> Health:
    """Check that the database answers, the disk takes a file, and there is space for deltas."""
    detail = _find_fault(services)
    if detail:
        response.status_code = 503
    return Health(
        status="unavailable" if detail else "ok",
        version=__version__,
        protocol=PROTOCOL_VERSION,
        detail=detail,
    )


def _find_fault(services: Services) -> str:
    try:
        needed_bytes = largest_expected_bytes(services.store)
    except StorageError as error:
        logger.warning("not ready: %s", error)
        return "the database does not answer"
    probe = services.home.uploads / f".{uuid.uuid4().hex}.probe"
    try:
        probe.write_bytes(b"ready?")
        probe.unlink()
    except OSError as error:
        logger.warning("not ready: %s", error)
        return "the disk does not take files"
    free_bytes = services.free_bytes(services.home.uploads)
    shortage = services.quota.shortage(
        needed_bytes, free_bytes=free_bytes, now=services.clock.now()
    )
    return f"a delta of {needed_bytes} bytes cannot be taken in: {shortage}" if shortage else ""
