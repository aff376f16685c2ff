"""Deltas made to hurt: lies in headers, numbers that are none, claims nobody can believe."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_server.plausibility import MOST_EXAMPLES
from fedra_server.runs import AssignmentState
from tests.contract.conftest import Participants
from tests.support.headquarters import Delta, Headquarters, Site, delta_tensors

MALFORMED = ProblemCode.TENSORS_MALFORMED
DENORMAL = np.float32(1e-45)

Header = dict[str, Any]
Work = tuple[Site, SliceManifest]


def with_header(data: bytes, header: bytes) -> bytes:
    """Put another header before the tensors of a file."""
    size_bytes = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + size_bytes :]


def changed(change: Callable[[Header], object]) -> Callable[[bytes], bytes]:
    """Lie in the header of a file."""

    def lie(data: bytes) -> bytes:
        header: Header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        change(header)
        return with_header(data, json.dumps(header).encode())

    return lie


def first_of(header: Header) -> Header:
    entry: Header = header[min(header, key=lambda name: header[name]["data_offsets"])]
    return entry


def swap_offsets(header: Header) -> None:
    entry = first_of(header)
    entry["data_offsets"].reverse()


def repeat_a_name(data: bytes) -> bytes:
    """Have the header name its first tensor twice."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    told = json.loads(header)
    name = min(told)
    again = json.dumps({name: told[name]}).encode()
    return with_header(data, header[:-1] + b"," + again[1:])


LIES: dict[str, tuple[ProblemCode, Callable[[bytes], bytes]]] = {
    "tensors that overlap": (
        MALFORMED, changed(lambda it: [e.update(data_offsets=[0, 4 * 64]) for e in it.values()])
    ),
    "a tensor behind the end": (
        MALFORMED, changed(lambda it: first_of(it).update(data_offsets=[2**40, 2**40 + 256]))
    ),
    "a tensor before the beginning": (
        MALFORMED, changed(lambda it: first_of(it).update(data_offsets=[-256, 0]))
    ),
    "an end before the beginning": (MALFORMED, changed(swap_offsets)),
    "a shape beyond all memory": (
        MALFORMED, changed(lambda it: first_of(it).update(shape=[2**39, 2**39, 2**39]))
    ),
    "a negative dimension": (MALFORMED, changed(lambda it: first_of(it).update(shape=[-1, -1]))),
    "a dimension in fractions": (MALFORMED, changed(lambda it: first_of(it).update(shape=[1.5]))),
    "a type of no number": (MALFORMED, changed(lambda it: first_of(it).update(dtype="OBJECT"))),
    "a name twice": (MALFORMED, repeat_a_name),
    "a header that is longer than the file": (
        MALFORMED, lambda data: (2**63).to_bytes(8, "little") + data[8:]
    ),
    "a header that is deep": (MALFORMED, lambda data: with_header(data, b"[" * 4000)),
    "a header of nothing": (MALFORMED, lambda data: with_header(data, b"null")),
    "bytes that no tensor covers": (MALFORMED, lambda data: data + bytes(64)),
    "a header and no tensors": (
        MALFORMED, lambda data: data[: 8 + int.from_bytes(data[:8], "little")]
    ),
    "another type": (
        ProblemCode.TENSOR_DTYPE,
        changed(lambda it: [e.update(dtype="I32") for e in it.values()]),
    ),
}  # fmt: skip


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
    """They are summed in float64, where they are ordinary numbers: there is no slow path."""
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
