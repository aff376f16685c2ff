"""Three of ten sites with real digits are hostile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fedra_server.auditing import audit
from tests.bench.poisoning import SCREENED, UNDEFENDED, Play, Result, played, staged
from tests.support.digit_cohort import SITES

PLAY = Play(0, "rotated")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small matrices are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clean() -> Result:
    return played(replace(PLAY, defence=UNDEFENDED))


@pytest.mark.parametrize("defence", [SCREENED, "norm-clipped-mean", "coordinate-median"])
def test_defences_hardly_touch_honest_sites_and_cost_little(clean: Result, defence: str) -> None:
    assert clean.before < 65
    assert clean.after > 85
    defended = played(replace(PLAY, defence=defence))
    assert defended.honest_held < 5
    assert defended.after > 0.9 * clean.after


def test_the_defended_run_is_close_to_the_clean_one_and_the_undefended_one_is_wrecked(
    clean: Result,
) -> None:
    undefended = played(replace(PLAY, defence=UNDEFENDED, attack="times -10"))
    assert undefended.after < 0.5 * clean.after
    with staged(replace(PLAY, attack="times -10")) as sites:
        assert 100 * sites.tune() > 0.85 * clean.after
        honest, hostile = sites.held()
        assert honest < 10
        assert hostile > 60
        assert {site for site, _ in sites.delivered[-SITES:]} == set(range(SITES))
        report = audit(sites.server.store, sites.server.blobs, sites.server.home, run=sites.run.run)
        assert report.is_clean, report


@pytest.mark.parametrize("merge", ["norm-clipped-mean", "trimmed-mean", "coordinate-median"])
def test_robust_merges_alone_bear_what_wrecks_a_mean(clean: Result, merge: str) -> None:
    defended = played(replace(PLAY, defence=f"{merge}, unscreened", attack="times 100"))
    assert defended.after > 0.85 * clean.after
