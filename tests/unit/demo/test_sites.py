"""The demo's sites are real digits that no two sites share, the same for the same seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedra_edge.data import match_labels, open_dataset
from sdk_examples.demo.sites import LABELS, STYLES, Site, make_sites


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, ...]:
    return make_sites(tmp_path_factory.mktemp("sites"))


def test_every_digit_belongs_to_exactly_one_site(sites: tuple[Site, ...]) -> None:
    owners = Counter(path.name for site in sites for path in site.directory.rglob("*.png"))
    assert len(owners) == 1797
    assert set(owners.values()) == {1}
    assert [site.name for site in sites] == list(STYLES)


def test_every_site_has_every_label_in_both_parts_and_a_mix_of_its_own(
    sites: tuple[Site, ...],
) -> None:
    mixes = []
    for site in sites:
        matched = match_labels(open_dataset(site.directory), LABELS)
        assert len(matched.train_indices) == site.train_examples
        assert len(matched.held_out_indices) == site.test_examples
        for indices in (matched.train_indices, matched.held_out_indices):
            assert {matched.label_ids[index] for index in indices} == set(range(10))
        mixes.append(Counter(matched.label_ids[index] for index in matched.train_indices))
        assert max(mixes[-1].values()) >= 1.5 * min(mixes[-1].values())
    assert len({mix.most_common(1)[0][0] for mix in mixes}) > 1


def test_the_same_seed_gives_the_same_files(sites: tuple[Site, ...], tmp_path: Path) -> None:
    for site, again in zip(sites, make_sites(tmp_path), strict=True):
        for path in sorted(site.directory.rglob("*.png"))[::10]:
            copy = again.directory / path.relative_to(site.directory)
            assert copy.read_bytes() == path.read_bytes()
