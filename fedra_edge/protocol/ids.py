"""Names for the identifiers that cross the wire, so that one is never taken for another."""

from __future__ import annotations

from typing import NewType

ClientId = NewType("ClientId", str)
"""An installation, given at enrolment."""

RunId = NewType("RunId", str)
"""One federated tuning run."""

AssignmentId = NewType("AssignmentId", str)
"""One row of one round's allocation matrix, as handed to one client."""

UploadId = NewType("UploadId", str)
"""One delta on its way to the server."""

ModelId = NewType("ModelId", str)
"""sha256 of a registered model's canonical description."""

Digest = NewType("Digest", str)
"""Lower-case hexadecimal sha256 of some bytes."""

LayerId = NewType("LayerId", int)
"""A layer of the whole model, counted from 0. Always global on the wire and on disk."""

Position = NewType("Position", int)
"""A layer's index inside a client's compacted model. Never leaves the edge."""

RoundNumber = NewType("RoundNumber", int)
"""Rounds of a run are counted from 1."""

RevisionNumber = NewType("RevisionNumber", int)
"""Published adapter states of a run are counted from 0, the untrained state."""
