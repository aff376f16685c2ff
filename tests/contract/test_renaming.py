"""A client that comes back may bring another name."""

from __future__ import annotations

from fedra_edge.protocol import routes
from fedra_edge.protocol.messages import RejoinRequest
from tests.support.builders import make_profile
from tests.support.headquarters import Headquarters


def test_a_rejoining_client_may_take_another_name(hq: Headquarters) -> None:
    with hq.site("plant 7", calibrated=False) as site:
        for name, known_as in ((None, "plant 7"), ("Plant South", "Plant South")):
            request = RejoinRequest(profile=make_profile(), name=name)
            answer = site.call(routes.REJOIN, request)
            assert (answer.status_code, answer.json()["name"]) == (200, known_as)
