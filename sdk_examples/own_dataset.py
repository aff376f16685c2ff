"""Take part with data that lies in no folder: ``python own_dataset.py SERVER ARRAYS.npz``.

The file holds ``images``, uint8 of shape (n, height, width) or (n, height, width, 3), and
``labels``, n names. Anything that can give an image and a name by index works the same way: a
database, a camera archive, a historian.
"""

import sys
from pathlib import Path

import numpy as np

from fedra_edge import ClientProgress, Example, FedraEdgeError, join


class ArrayDataset:
    """Implements ``fedra_edge.LocalDataset``: five methods, no base class."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self._images = arrays["images"]
            self._labels = [str(label) for label in arrays["labels"]]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], self._labels[index])

    def label_of(self, index: int) -> str:
        """Give the name of the label, as the model knows it; order never matters."""
        return self._labels[index]

    def key_of(self, index: int) -> str:
        """Give a name that stays with the example; it decides what is held out."""
        return f"example-{index}"

    def is_held_out(self, index: int) -> bool | None:
        """Keep every fifth example for evaluation; None would leave it to the key."""
        return index % 5 == 0


def show(progress: ClientProgress) -> None:
    """Print what the client does; called from its thread, so it should be quick."""
    print(progress.phase, progress.detail)


def main(server: str, arrays: str) -> None:
    """Join with the arrays and take part until the run is over or Ctrl-C."""
    with join(server, dataset=ArrayDataset(Path(arrays)), on_progress=show) as client:
        client.wait()


if __name__ == "__main__":
    try:
        _, server, arrays = sys.argv
    except ValueError:
        sys.exit(__doc__)
    try:
        main(server, arrays)
    except (FedraEdgeError, OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
