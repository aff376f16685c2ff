"""Client SDK for federated tuning on machines that cannot hold the model.

    import fedra_edge

    with fedra_edge.join("https://hq.example:8470#SECRET.FINGERPRINT", data="images") as client:
        client.wait()

The join string comes from headquarters; once this machine has joined, the address is enough.

Importing this package is quick: what is heavy is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fedra_edge.client import EdgeClient, join
    from fedra_edge.config import EdgeConfig
    from fedra_edge.data.dataset import Example, LocalDataset, TextExample
    from fedra_edge.data.image_folder import ImageFolder
    from fedra_edge.data.manifest import ManifestDataset
    from fedra_edge.data.text_folder import TextFolder
    from fedra_edge.data.text_manifest import TextManifest
    from fedra_edge.errors import (
        BackendUnavailableError,
        ClientRevokedError,
        ConfigurationError,
        DataError,
        DeltaRefusedError,
        FedraEdgeError,
        IdentityError,
        JoinRefusedError,
        NotAuthenticatedError,
        NotFoundError,
        NotPermittedError,
        OffsetMismatchError,
        ProtocolMismatchError,
        RoundClosedError,
        ServerRefusedError,
        ServerUnreachableError,
        SliceError,
        StorageError,
        StorageFullError,
        TrainingInterrupted,
        UnexpectedAnswerError,
        UntrustedServerError,
        WorkInterrupted,
        WrongServerError,
    )
    from fedra_edge.prediction import LabelProbability, Prediction, Predictions, predict
    from fedra_edge.progress import ClientProgress, Phase
    from fedra_edge.training.trainer import (
        BlockCost,
        EvaluationCounts,
        PieceFile,
        SliceWork,
        TrainedSlice,
        Trainer,
        WholeModel,
    )

    __version__: str

__all__ = [
    "BackendUnavailableError",
    "BlockCost",
    "ClientProgress",
    "ClientRevokedError",
    "ConfigurationError",
    "DataError",
    "DeltaRefusedError",
    "EdgeClient",
    "EdgeConfig",
    "EvaluationCounts",
    "Example",
    "FedraEdgeError",
    "IdentityError",
    "ImageFolder",
    "JoinRefusedError",
    "LabelProbability",
    "LocalDataset",
    "ManifestDataset",
    "NotAuthenticatedError",
    "NotFoundError",
    "NotPermittedError",
    "OffsetMismatchError",
    "Phase",
    "PieceFile",
    "Prediction",
    "Predictions",
    "ProtocolMismatchError",
    "RoundClosedError",
    "ServerRefusedError",
    "ServerUnreachableError",
    "SliceError",
    "SliceWork",
    "StorageError",
    "StorageFullError",
    "TextExample",
    "TextFolder",
    "TextManifest",
    "TrainedSlice",
    "Trainer",
    "TrainingInterrupted",
    "UnexpectedAnswerError",
    "UntrustedServerError",
    "WholeModel",
    "WorkInterrupted",
    "WrongServerError",
    "__version__",
    "join",
    "predict",
]

_ELSEWHERE: Final = {
    "BlockCost": "training.trainer",
    "ClientProgress": "progress",
    "EdgeClient": "client",
    "EdgeConfig": "config",
    "EvaluationCounts": "training.trainer",
    "Example": "data.dataset",
    "ImageFolder": "data.image_folder",
    "LabelProbability": "prediction",
    "LocalDataset": "data.dataset",
    "ManifestDataset": "data.manifest",
    "Phase": "progress",
    "PieceFile": "training.trainer",
    "Prediction": "prediction",
    "Predictions": "prediction",
    "SliceWork": "training.trainer",
    "TextExample": "data.dataset",
    "TextFolder": "data.text_folder",
    "TextManifest": "data.text_manifest",
    "TrainedSlice": "training.trainer",
    "Trainer": "training.trainer",
    "WholeModel": "training.trainer",
    "join": "client",
    "predict": "prediction",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (PEP 562: the type is that of the name)
    if name == "__version__":
        from importlib.metadata import version

        return version("fedra")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
