"""Use a tuned model inside a program: ``python predict.py EXPORT DATA``.

EXPORT is what ``fedra-server export`` wrote. Every image gets a label; those that the model is
not sure of are left to a person. The model is read block by block, so it may be larger than the
memory of this machine.
"""

import sys

import fedra_edge

SURE = 0.9

try:
    _, export, data = sys.argv
except ValueError:
    sys.exit(__doc__)
try:
    predictions = fedra_edge.predict(export, data)
    for told in predictions:
        doubt = "" if told.probability >= SURE else ", for a person to check"
        print(f"{told.key}: {told.label} ({told.probability:.0%}){doubt}", flush=True)
    for line in predictions.skipped:
        print("skipped:", line)
except fedra_edge.FedraEdgeError as error:
    sys.exit(f"error: {error}")
