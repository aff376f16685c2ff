"""Take part in federated tuning with a folder of images: ``python join.py SERVER DATA``."""

import sys

import fedra_edge

with fedra_edge.join(sys.argv[1], data=sys.argv[2]) as client:
    client.wait()
