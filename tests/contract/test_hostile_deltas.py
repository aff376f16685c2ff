"""Deltas made to hurt: lies in headers, numbers that are none, claims nobody can believe."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_server.plausibility import MOST_EXAMPLES
from fedra_server.runs import AssignmentState
from tests.contract.conftest import Participants
from tests.support.headquarters import Delta, Headquarters, Site, delta_tensors
from tests.support.hostile_tensors import LIES

DENORMAL = np.float32(1e-45)

Work = tuple[Site, SliceManifest]


def send(site: Site, data: bytes, work: SliceManifest) -> httpx.Response:
    return site.send(Delta.of(data, work.assignment_id))


def honest(hq: Headquarters, work: SliceManifest) -> dict[str, FloatArray]:
    return delta_tensors(hq.spec, work)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_and_settles_the_assignment(
    hq: Headquarters, participant: Work, lie: str
) -> None:
    code, tell = LIES[lie]
    site, work = participant
    answer = send(site, tell(serialize_tensors(honest(hq, work))), work)
    assert answer.json()["code"] == code, answer.text
    assert hq.services.store.assignment(work.id).state is AssignmentState.REFUSED
    assert list(hq.services.home.uploads.iterdir()) == []
    assert not hq.services.home.delta_file(AssignmentId(work.assignment_id)).exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.1e6, np.finfo(np.float32).max])
def test_no_value_may_spoil_a_sum(hq: Headquarters, participant: Work, value: float) -> None:
    site, work = participant
    tensors = honest(hq, work)
    tensors[max(tensors)].flat[-1] = value
    answer = send(site, serialize_tensors(tensors), work)
    assert (answer.status_code, answer.json()["code"]) == (422, "tensor-not-finite")


def test_denormal_values_are_values(hq: Headquarters, participants: Participants) -> None:
    """They are summed in float64, where they are ordinary numbers."""
    (one, first), (two, second) = participants()
    for site, work in ((one, first), (two, second)):
        tensors = {name: np.full_like(it, DENORMAL) for name, it in honest(hq, work).items()}
        assert send(site, serialize_tensors(tensors), work).status_code == 200
    assert one.work().revision.number == 1


def test_a_layer_that_was_not_assigned_is_refused(hq: Headquarters, participant: Work) -> None:
    site, work = participant
    tensors = honest(hq, work)
    name = next(it for it in tensors if it.startswith("layers."))
    tensors[name.replace(name.split("/")[0], "layers.77")] = tensors[name]
    answer = send(site, serialize_tensors(tensors), work)
    assert answer.json()["code"] in {"tensor-unexpected", "delta-too-large"}


@pytest.mark.parametrize("claim", [101, MOST_EXAMPLES + 1, 2**31])
def test_nobody_claims_more_examples_than_it_has(
    hq: Headquarters, participant: Work, claim: int
) -> None:
    site, work = participant  # which calibrated with 100
    manifest = hq.delta(work).manifest.model_copy(update={"num_examples": claim})
    answer = site.call(routes.UPLOAD_CREATE, manifest)
    assert (answer.status_code, answer.json()["code"]) == (422, "num-examples-implausible")
    assert hq.services.store.assignment(work.id).state is AssignmentState.REFUSED


def test_a_claim_as_large_as_it_may_be_is_believed(hq: Headquarters, participant: Work) -> None:
    site, work = participant
    delta = hq.delta(work)
    most = delta.manifest.model_copy(update={"num_examples": 100})
    assert site.send(Delta(delta.data, most)).status_code == 200


def test_a_stolen_upload_is_of_no_use(hq: Headquarters, participants: Participants) -> None:
    (owner, work), (thief, _) = participants()
    delta = hq.delta(work)
    upload = owner.announce(delta)
    taken = thief.append(upload.upload_id, delta.data)
    looked = thief.call(routes.UPLOAD_OFFSET, parts={"upload_id": upload.upload_id})
    announced = thief.call(routes.UPLOAD_CREATE, delta.manifest)
    assert (taken.status_code, looked.status_code, announced.status_code) == (403, 403, 403)
    assert taken.json()["code"] == "not-permitted"
    assert owner.append(upload.upload_id, delta.data).status_code == 200


def test_a_replayed_delta_changes_nothing(hq: Headquarters, participant: Work) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    assert site.append(upload.upload_id, delta.data).status_code == 200
    before = hq.services.store.assignment(work.id)
    again = site.append(upload.upload_id, delta.data)
    assert again.json()["code"] == "offset-mismatch"
    assert site.announce(delta).offset_bytes == len(delta.data)
    assert site.append(upload.upload_id, b"", offset=len(delta.data)).status_code == 200
    assert hq.services.store.assignment(work.id) == before
