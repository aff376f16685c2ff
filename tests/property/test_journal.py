"""The journal's chain: whatever is done to entries that were written, somebody finds it."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_server.chain import (
    BEFORE_ALL,
    BrokenChain,
    Entry,
    Event,
    Head,
    canonical,
    entry_after,
    head_of,
    verify,
)

TEXTS = st.text(max_size=12)
DETAILS = st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers() | TEXTS, max_size=3)
HAPPENINGS = st.tuples(
    st.floats(0, 4e9), st.sampled_from(Event), TEXTS, TEXTS, DETAILS
)  # fmt: skip
COLUMNS = tuple(Entry.__dataclass_fields__)


def chain_of(happenings: list[tuple[float, Event, str, str, dict[str, Any]]]) -> list[Entry]:
    entries: list[Entry] = []
    head = BEFORE_ALL
    for at, event, subject, by, details in happenings:
        entries.append(entry_after(head, at, event, subject=subject, by=by, details=details))
        head = head_of(entries[-1])
    return entries


CHAINS = st.lists(HAPPENINGS, min_size=1, max_size=6).map(chain_of)


def other_value(value: object, data: st.DataObject) -> Any:  # noqa: ANN401 (for any column)
    """Change one character of a text, or a number into another."""
    if isinstance(value, str):
        place = data.draw(st.integers(0, len(value)))
        return data.draw(st.sampled_from([
            value[:place] + data.draw(st.characters()) + value[place + 1 :],
            value[:place] + value[place + 1 :],
            value[:place] + data.draw(st.characters()) + value[place:],
        ]))  # fmt: skip
    return data.draw(st.floats(0, 4e9) | st.integers(0, 10) | st.none() | st.binary())


@given(CHAINS)
def test_what_was_written_verifies_and_each_entry_proves_all_before_it(chain: list[Entry]) -> None:
    assert verify(chain) == head_of(chain[-1])
    for anchor in map(head_of, chain):
        assert verify(chain, anchor) == head_of(chain[-1])
        assert Head.parse(str(anchor)) == anchor
    for earlier, later in pairwise(chain):
        assert later.previous_sha256 == earlier.sha256


@given(CHAINS, st.data())
def test_a_change_of_any_character_of_any_entry_is_found(
    chain: list[Entry], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(chain) - 1))
    column = data.draw(st.sampled_from(COLUMNS))
    before = asdict(chain[index])[column]
    after = other_value(before, data)
    changed: dict[str, Any] = {column: after}
    chain[index] = replace(chain[index], **changed)
    is_changed = type(before) is not type(after) or before != after
    found = verify(chain)
    assert isinstance(found, BrokenChain) == is_changed
    if isinstance(found, BrokenChain):
        assert found.sequence == index + 1


@given(CHAINS, st.data())
def test_a_changed_entry_with_a_digest_made_for_it_breaks_the_next(
    chain: list[Entry], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(chain) - 1))
    anchor = head_of(chain[-1])
    before = BEFORE_ALL if index == 0 else head_of(chain[index - 1])
    chain[index] = entry_after(
        before, 0.0, Event.RUN_STOPPED, subject="forged", by="nobody", details={}
    )  # fmt: skip
    found = verify(chain, anchor)
    assert isinstance(found, BrokenChain)
    assert found.sequence == min(index + 2, len(chain))


@given(CHAINS, st.data())
def test_an_entry_left_out_is_found(chain: list[Entry], data: st.DataObject) -> None:
    anchor = head_of(chain[-1])
    index = data.draw(st.integers(0, len(chain) - 1))
    del chain[index]
    found = verify(chain, anchor)
    assert isinstance(found, BrokenChain)
    assert found.sequence == index + 1


@given(CHAINS, CHAINS, st.data())
def test_an_entry_inserted_or_doubled_is_found(
    chain: list[Entry], others: list[Entry], data: st.DataObject
) -> None:
    chain.insert(
        data.draw(st.integers(0, len(chain) - 1)), data.draw(st.sampled_from([*chain, *others]))
    )  # fmt: skip
    assert isinstance(verify(chain), BrokenChain)


@given(CHAINS.filter(lambda chain: len(chain) > 1), st.data())
def test_entries_in_another_order_are_found(chain: list[Entry], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(chain).filter(lambda order: order != chain))
    assert isinstance(verify(shuffled), BrokenChain)
    renumbered = [replace(entry, sequence=i) for i, entry in enumerate(shuffled, 1)]
    assert isinstance(verify(renumbered), BrokenChain)


@given(CHAINS, st.data())
def test_a_chain_cut_off_at_its_end_is_found_by_who_kept_a_later_head(
    chain: list[Entry], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(chain) - 1))
    found = verify(chain[:kept], head_of(chain[-1]))
    assert isinstance(found, BrokenChain)
    assert found.sequence == kept + 1


@given(CHAINS, st.data())
def test_a_chain_made_anew_is_found_by_who_kept_a_head(
    chain: list[Entry], data: st.DataObject
) -> None:
    anchor = head_of(data.draw(st.sampled_from(chain)))
    anew = chain_of([
        (entry.at + 1, Event(entry.event), entry.subject, entry.by, {}) for entry in chain
    ])  # fmt: skip
    assert verify(anew) == head_of(anew[-1])
    found = verify(anew, anchor)
    assert isinstance(found, BrokenChain)
    assert found.sequence == anchor.sequence


@pytest.mark.parametrize(
    "text", ["", "1", "1:", ":" + "0" * 64, "0:" + "0" * 64, "-1:" + "0" * 64, "1:" + "0" * 63,
             "1:" + "g" * 64, "1:" + "A" * 64, "1:" + "0" * 65, "1" * 20 + ":" + "0" * 64,
             "\u0661:" + "0" * 64, "1:" + "0" * 64 + "\n"],
)  # fmt: skip
def test_only_a_head_parses(text: str) -> None:
    with pytest.raises(ValueError, match="NUMBER:SHA256"):
        Head.parse(text)


def test_an_empty_journal_is_a_broken_one() -> None:
    assert isinstance(verify([]), BrokenChain)


def test_the_digest_is_what_the_documentation_says() -> None:
    [entry] = chain_of([(12.5, Event.RUN_STARTED, "digits", "command", {"b": 1, "a": "ä"})])
    assert entry.details == canonical({"a": "ä", "b": 1}) == '{"a":"ä","b":1}'
    assert entry.sha256 == "f0f958805c3ad732cac9361c78fcdfbc761dc04e7cbc899ce41e7dcab3cb7adb"
