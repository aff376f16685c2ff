"""Who may talk to whom, and what is said when they may not."""

from __future__ import annotations

import pytest

from fedra_edge.protocol.version import is_compatible, skew, upgrade_advice


@pytest.mark.parametrize(
    ("theirs", "works", "word"),
    [
        ("1.1", True, ""),
        ("1.0", True, "older"),
        ("1.2", True, "newer"),
        ("1.10", True, "newer"),
        ("1", True, ""),
        ("1.x", True, ""),
        ("1.01", True, ""),
        ("2.0", False, ""),
        ("0.9", False, ""),
        ("11.1", False, ""),
        ("", False, ""),
    ],
)
def test_a_peer_of_the_same_major_version_works(theirs: str, works: bool, word: str) -> None:
    assert is_compatible("1.1", theirs) == works
    assert skew("1.1", theirs) == word


def test_the_older_side_is_to_be_upgraded() -> None:
    advice = upgrade_advice("1.1", "2.3", "0.9.0")
    assert "Upgrade the client on this machine" in advice
    assert "2.x (the server runs fedra 0.9.0)" in advice
    advice = upgrade_advice("10.0", "9.3")
    assert "Upgrade the server to a release that speaks protocol 10.x" in advice
    assert advice.endswith("speaks 9.x.")


@pytest.mark.parametrize("client", ["", "new", "²", "9" * 5000])
def test_what_is_no_version_is_told_too(client: str) -> None:
    assert "states no protocol version" in upgrade_advice(client, "1.1")
