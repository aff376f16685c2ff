"""The description of a registered model."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Response

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import HexDigest
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.services import ServicesHere

router = APIRouter(tags=["models"], dependencies=[SpeaksProtocol])

IMMUTABLE: Final = "private, max-age=31536000, immutable"
"""Cache-Control of what is named by its content."""


@mount(router, routes.MODEL, *FOR_CLIENTS, ProblemCode.NOT_FOUND, ProblemCode.NOT_ASSIGNED)
def describe_model(
    model_id: HexDigest, services: ServicesHere, client: Caller, response: Response
) -> ModelSpec:
    """Give everything a client needs to know of a model, except the weights."""
    services.reach.require_model(client, model_id)
    spec = services.store.model(ModelId(model_id)).spec
    response.headers["Cache-Control"] = IMMUTABLE
    return spec
