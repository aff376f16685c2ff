"""Take part in federated tuning with a folder of images: ``python join.py SERVER DATA``.

SERVER is the join string that headquarters gives out; later on its address is enough.
"""

import sys

import fedra_edge

told: list[str] = [""]


def show(progress: fedra_edge.ClientProgress) -> None:
    """Print what the client does now; it calls this with every change, however small."""
    if progress.detail != told[-1]:
        told[-1] = progress.detail
        print(progress.phase, progress.detail, flush=True)


try:
    _, server, data = sys.argv
except ValueError:
    sys.exit(__doc__)
try:
    with fedra_edge.join(server, data=data, on_progress=show) as client:
        client.wait()
except fedra_edge.FedraEdgeError as error:
    sys.exit(f"error: {error}")
