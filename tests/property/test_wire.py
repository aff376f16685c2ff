"""Texts and numbers from the wire: whatever is sent is read, altered as told, or refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedra_edge.protocol.messages import FailureReport
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.version import PROTOCOL_VERSION, is_compatible, skew, upgrade_advice
from fedra_edge.protocol.wire import byte_count_of
from tests.support.builders import make_model_spec

MANY_DIGITS = "9" * 5000
DIGITS = st.text(st.characters(categories=["Nd"]), max_size=30)


@given(st.text(max_size=40) | DIGITS)
@example(MANY_DIGITS)
def test_a_count_of_bytes_is_read_or_is_none(text: str) -> None:
    count = byte_count_of(text)
    assert count is None or 0 <= count < 10**16
    assert byte_count_of(str(count)) == count


@given(st.text(max_size=20) | DIGITS, st.text(max_size=20) | DIGITS)
@example(MANY_DIGITS, "0")
@example("1", MANY_DIGITS)
def test_any_version_can_be_talked_about(major: str, minor: str) -> None:
    theirs = f"{major}.{minor}"
    assert skew(PROTOCOL_VERSION, theirs) in {"", "older", "newer"}
    assert len(upgrade_advice(theirs, PROTOCOL_VERSION)) < 300
    assert len(upgrade_advice(PROTOCOL_VERSION, theirs)) < 300
    assert is_compatible(theirs, theirs)


@given(st.text(st.sampled_from("\0ab"), max_size=50))
def test_a_text_arrives_without_what_a_database_cannot_keep(text: str) -> None:
    assert FailureReport(detail=text).detail == text.replace("\0", "")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "9" * 5000])
def test_a_configuration_that_json_cannot_say_again_is_refused(number: str) -> None:
    said = make_model_spec().model_dump_json()
    assert '"hidden_size":8' in said
    with pytest.raises(ValidationError):
        ModelSpec.model_validate_json(said.replace('"hidden_size":8', f'"hidden_size":{number}'))
