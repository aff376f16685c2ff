"""Three of ten real sites send their deltas with the signs turned round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedra_server.auditing import audit
from tests.bench.poisoning import ATTACKERS, DEFENCES, RUN, SCREENED, UNDEFENDED
from tests.support.digit_cohort import (
    ATTACKS,
    SITES,
    Attack,
    DigitCohort,
    Digits,
    digit_cohort,
    save_model,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "saved"
    save_model(Digits.load(), directory)
    return directory


@contextmanager
def cohort(
    directory: Path, saved: Path, defence: str, attack: Attack | None = None
) -> Iterator[DigitCohort]:
    options = {**RUN, **DEFENCES[defence]}
    with digit_cohort(
        directory, saved, options, attackers=0 if attack is None else ATTACKERS, attack=attack
    ) as sites:
        yield sites


def test_the_defended_run_is_close_to_the_clean_one_and_the_undefended_one_is_wrecked(
    saved: Path, tmp_path: Path
) -> None:
    flipped, screened = ATTACKS["signs flipped"], SCREENED
    with cohort(tmp_path / "clean", saved, screened) as sites:
        clean = sites.tune()
        assert sites.quarantined() == set()
    with cohort(tmp_path / "undefended", saved, UNDEFENDED, flipped) as sites:
        undefended = sites.tune()
    with cohort(tmp_path / "defended", saved, screened, flipped) as sites:
        defended = sites.tune()
        assert sites.quarantined() == set(range(SITES - ATTACKERS, SITES))
        report = audit(sites.server.store, sites.server.blobs, sites.server.home, run=sites.run.run)
        assert report.is_clean, report
    assert defended > 0.8 * clean
    assert undefended < 0.65 * clean
