"""A real client whose training takes no time: ``python -m tests.support.instant_site URL HOME``."""

from __future__ import annotations

import sys
from pathlib import Path

from typing_extensions import override

from fedra_edge.client import EdgeClient
from fedra_edge.config import load_config
from tests.support.edge_site import CountingTrainer, MemoryDataset


class TrainingImages(MemoryDataset):
    """A few images, none of them held out, so that nothing is evaluated."""

    @override
    def is_held_out(self, index: int) -> bool | None:
        """Hold out none."""
        return index < 0


def main(url: str, home: str) -> None:
    """Take part until the process is ended."""
    config = load_config({"server": url, "home": home, "name": Path(home).name})
    dataset = TrainingImages(size=3)
    with EdgeClient(config, dataset=dataset, trainer=CountingTrainer()) as client:
        client.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
