"""What the server tells a client to do next, and what clients tell of a revision's quality."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedra_edge.protocol.models import AdapterSpec, PieceGraphs
from fedra_edge.protocol.slices import RevisionManifest, SliceManifest
from fedra_edge.protocol.wire import Count, Detail, HexDigest, ShortText, WireModel


class EvaluationTask(WireModel):
    """Asks for the accuracy of a revision of the whole model on the held-out local examples."""

    run: ShortText
    model_id: HexDigest
    revision: RevisionManifest
    adapter: AdapterSpec
    graphs: PieceGraphs | None = None


class Evaluation(WireModel):
    """Counts of one client on one revision; never a single example."""

    run: ShortText
    revision: Annotated[int, Field(ge=0, lt=2**31)]
    num_examples: Annotated[int, Field(ge=1, lt=2**31)]
    num_correct: Count
    loss_sum: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _correct_are_among_the_examples(self) -> Evaluation:
        if self.num_correct > self.num_examples:
            raise ValueError("num_correct is larger than num_examples")
        return self


class Train(WireModel):
    """Train this slice and send its delta. ``evaluate`` asks to measure the base first."""

    kind: Literal["train"] = "train"
    manifest: SliceManifest
    evaluate: EvaluationTask | None = None


class Wait(WireModel):
    """Nothing to train now; ask again. Meanwhile calibrate or evaluate, when asked to."""

    kind: Literal["wait"] = "wait"
    reason: Detail
    calibrate: HexDigest | None = None
    evaluate: EvaluationTask | None = None


class Stop(WireModel):
    """There will be no more work for this client; it may exit."""

    kind: Literal["stop"] = "stop"
    reason: Detail


Assignment = Annotated[Train | Wait | Stop, Field(discriminator="kind")]
