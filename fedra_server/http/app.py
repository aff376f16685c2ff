"""The application as a value: routes, limits, error answers and the OpenAPI document."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from typing_extensions import override

from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_server.http import (
    admitting,
    assignments,
    blobs,
    clients,
    evaluations,
    health,
    metrics,
    models,
    operating,
    trust,
    uploads,
)
from fedra_server.http.discarding import discard_dead_uploads
from fedra_server.http.fairness import FairShare, Shares
from fedra_server.http.limits import BodyLimit, LingeringClose, ProtocolStamp
from fedra_server.http.mounting import complete_document
from fedra_server.http.plainness import PlainRequests
from fedra_server.http.problems import DefectAnswer, install_problems
from fedra_server.http.services import Services

_THREADS: Final = 12
"""Threads for handlers: each keeps memory, and only one of them computes at a time."""


_MODULES: Final = (
    admitting,
    health,
    trust,
    clients,
    assignments,
    models,
    blobs,
    uploads,
    evaluations,
    operating,
    metrics,
)


class Application(FastAPI):
    """FastAPI, with problem documents under their own media type in the OpenAPI document."""

    @override
    def openapi(self) -> dict[str, Any]:
        """Give the OpenAPI document, built once."""
        if self.openapi_schema is None:
            complete_document(super().openapi())
        return super().openapi()


def create_app(services: Services) -> FastAPI:
    """Build the application over its services; it starts no thread and opens no file.

    Pages that load scripts from elsewhere are off, because plants are offline.
    """
    app = Application(
        title="fedra-server",
        description="Federated tuning: assignments and weights down, adapter deltas up.",
        version=PROTOCOL_VERSION,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    install_problems(app)
    app.add_middleware(BodyLimit, max_bytes=services.config.max_request_bytes)
    app.add_middleware(FairShare, shares=Shares(services.config))
    app.add_middleware(PlainRequests)
    app.add_middleware(DefectAnswer)
    app.add_middleware(ProtocolStamp)
    app.add_middleware(LingeringClose)
    for module in _MODULES:
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Deliver the coordinator's changes to the event loop that serves the long-polls."""
    services: Services = app.state.services
    services.changes.bind()
    current_default_thread_limiter().total_tokens = _THREADS
    services.coordinator.subscribe(services.changes.notify)
    services.coordinator.subscribe(partial(discard_dead_uploads, services))
    yield
    services.changes.close()
