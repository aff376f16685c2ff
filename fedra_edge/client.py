"""A client inside another program: a session in a thread of its own, steered from outside."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypedDict, Unpack

import httpx

from fedra_edge.api import ServerApi
from fedra_edge.batching import begin_together
from fedra_edge.config import EdgeConfig, SiteConfig, load_config
from fedra_edge.control import Control
from fedra_edge.data.dataset import LocalDataset
from fedra_edge.data.opening import open_dataset
from fedra_edge.enrolling import Enrolment
from fedra_edge.errors import ConfigurationError, FedraEdgeError, ServerUnreachableError
from fedra_edge.home_lock import home_lock
from fedra_edge.keys import load_signing
from fedra_edge.layer_cache import LayerCache
from fedra_edge.metering import BoardMeter
from fedra_edge.mirrors import MirroredFetch, open_mirrors
from fedra_edge.network_errors import remedy_of
from fedra_edge.outbox import Outbox
from fedra_edge.participation import Equipment
from fedra_edge.profiling import measure_device
from fedra_edge.progress import ClientProgress, OnProgress, Phase, ProgressBoard
from fedra_edge.resting import Rest
from fedra_edge.retrying import Retrier
from fedra_edge.session import Session
from fedra_edge.training import load_trainer
from fedra_edge.training.trainer import Trainer
from fedra_edge.transport import Transport, open_http_client

LOGGER: Final = logging.getLogger(__name__)
STOP_S: Final = 30.0


class EdgeOptions(TypedDict, total=False):
    """The optional settings of ``join``, as ``EdgeConfig`` explains them."""

    home: Path | str
    name: str
    run: str
    memory_bytes: int | str
    max_layers: int
    disk_quota_bytes: int | str
    backend: Literal["auto", "torch", "onnx"]
    threads: int
    max_bandwidth: int | str
    mirrors: Sequence[str]
    proxy: str
    ca_file: Path | str
    insecure_http: bool


@dataclass(frozen=True)
class Resting:
    """What a client that may rest is told: the command that starts it, what it did before.

    ``session`` is the one that it rested with, if it comes from a rest.
    """

    command: tuple[str, ...]
    contributed: int
    session: str | None = field(default=None, repr=False)


class EdgeClient:
    """Takes part in federated tuning from a background thread.

    It never touches signals, logging configuration or the main thread. The thread is no
    daemon: a program that ends must ``stop`` its client, or use it in a ``with`` block.

    Args:
        config: The settings; ``join`` makes them from plain arguments.
        dataset: Local data of the program's own; without it ``config.data`` is opened.
        trainer: A trainer of the program's own; without it ``config.backend`` is loaded.
        on_progress: Called with every change, from a thread of the client's and by one at a time;
            it should be quick.
        http: A connection pool of the program's own, with its base URL set to the server.
        resting: For the command line: how to rest instead of waiting for long.
    """

    def __init__(
        self,
        config: EdgeConfig,
        *,
        dataset: LocalDataset | None = None,
        trainer: Trainer | None = None,
        on_progress: OnProgress | None = None,
        http: httpx.Client | None = None,
        resting: Resting | None = None,
    ) -> None:
        if dataset is None and config.data is None:
            raise ConfigurationError(
                "no local data is given",
                remedy="give --data (in a program: data), a directory or CSV file, or a dataset",
            )
        self._config = config
        self._dataset = dataset
        self._trainer = trainer
        self._resting = resting
        self._rest: Rest | None = None
        self._board = ProgressBoard(on_progress, resting.contributed if resting else 0)
        link = config.link
        self._owns_connections = http is None
        self._transport = Transport(http or open_http_client(config.server, link), link)
        self._enrolment: Enrolment | None = None
        self._mirrors = open_mirrors(config.mirrors, link, self._transport.bandwidth)
        self._control = Control(on_stop=self._interrupt)
        self._thread = threading.Thread(target=self._run, name="fedra-edge")
        self._error: Exception | None = None

    def start(self) -> Self:
        """Start taking part; returns at once.

        Raises:
            ConfigurationError: This client was started before.
        """
        if self._thread.ident is not None:
            raise ConfigurationError("a client starts only once", remedy="create another one")
        self._thread.start()
        return self

    def pause(self) -> None:
        """Rest from the next training step on; the server is told when no round waits."""
        self._control.pause()

    def resume(self) -> None:
        """End a pause."""
        self._control.resume()

    def stop(self, timeout_s: float = STOP_S) -> bool:
        """End at the next training step and tell the server; true when it ended in time."""
        self._control.stop()
        is_ours = self._thread is threading.current_thread() or self._board.is_telling
        if self._thread.ident is not None and not is_ours:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; true when it has come.

        Raises:
            FedraEdgeError: What the session ended with.
        """
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    @property
    def status(self) -> ClientProgress:
        """What the client is doing now."""
        return self._board.current

    @property
    def error(self) -> Exception | None:
        """What the session ended with, if it ended badly."""
        return self._error

    @property
    def rest(self) -> Rest | None:
        """How to go on with less memory, when the client ended because it is idle."""
        return self._rest

    def __enter__(self) -> Self:
        """Start, when not started yet."""
        return self if self._thread.ident is not None else self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop and wait for the end."""
        self.stop()

    def _run(self) -> None:
        try:
            with home_lock(self._config.home):
                session = self._build_session()
                session.run()
        except FedraEdgeError as error:
            LOGGER.error("the client ends: %s", error)  # noqa: TRY400 (expected; no traceback)
            self._fail(error)
        except Exception as error:
            LOGGER.exception("the client ends because of a defect")
            self._fail(error)
        else:
            self._end(session)
        finally:
            self._transport.close()
            for _, mirror in self._mirrors:
                mirror.close()

    def _end(self, session: Session) -> None:
        if self._resting is None or not session.is_resting:
            self._board.update(phase=Phase.STOPPED, detail="stopped")
            return
        self._board.update(detail="resting until there is work")
        config = self._config
        self._rest = Rest(
            server=config.server,
            home=config.home,
            membership=config.membership,
            poll_s=config.poll_s,
            caps=config.caps,
            link=self._transport.link,
            contributed=self._board.current.rounds_contributed,
            command=self._resting.command,
            session=self._enrolment.session if self._enrolment is not None else None,
        )

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._board.update(phase=Phase.FAILED, detail=str(error) or type(error).__name__)

    def _build_session(self) -> Session:
        config = self._config
        meter = partial(BoardMeter, self._board)
        retrier = Retrier(self._control.stopping, self._on_retry)
        api = ServerApi(self._transport, retrier, meter=meter)
        dataset = self._dataset
        if dataset is None:
            dataset = open_dataset(config.data or Path())
        self._board.update(detail="loading the training runtime")
        load_signing()
        trainer = self._trainer or load_configured_trainer(config)
        fetch = MirroredFetch(self._mirrors, api.download_blob)
        begin = None if self._mirrors else partial(begin_together, self._transport)
        cache = LayerCache(config.blobs, config.disk_quota_bytes, fetch, meter, begin)
        equipment = Equipment(
            config=config,
            control=self._control,
            board=self._board,
            transport=self._transport,
            api=api,
            outbox=Outbox(config.outbox),
            layer_cache=cache,
            dataset=dataset,
            trainer=trainer,
        )
        measure = partial(
            measure_device,
            backend=trainer.backend,
            home=config.home,
            caps=config.caps,
            cached_bytes=cache.used_bytes,
        )
        self._enrolment = Enrolment(
            config,
            self._transport,
            api,
            may_pin=self._owns_connections,
            session=self._resting.session if self._resting is not None else None,
        )
        return Session(equipment, self._enrolment, measure, may_rest=self._resting is not None)

    def _interrupt(self) -> None:
        self._transport.interrupt()
        for _, mirror in self._mirrors:
            mirror.interrupt()

    def _on_retry(self, error: ServerUnreachableError, wait_s: float) -> None:
        remedy = remedy_of(error)
        hint = f" ({remedy})" if remedy else ""
        detail = f"{error}{hint}; trying again in {max(1, round(wait_s))} s"
        LOGGER.warning("%s", detail)
        self._board.update(phase=Phase.CONNECTING, detail=detail)


def join(
    server: str,
    data: Path | str | None = None,
    *,
    dataset: LocalDataset | None = None,
    trainer: Trainer | None = None,
    on_progress: OnProgress | None = None,
    **options: Unpack[EdgeOptions],
) -> EdgeClient:
    """Start a client in the background and give it back at once.

    Example:
        >>> client = join(
        ...     "https://hq.example:8470#SECRET.FINGERPRINT", data="images"
        ... )  # doctest: +SKIP
        >>> client.status.phase  # doctest: +SKIP
        >>> client.stop()  # doctest: +SKIP

    Args:
        server: The join string that headquarters gives out; once joined, the address is enough.
        data: A directory with one directory of images or texts per class, or a CSV manifest.
        dataset: A dataset of the program's own, instead of ``data``.
        trainer: A trainer of the program's own.
        on_progress: Called with every change, from the client's thread.
        **options: Further settings, as ``EdgeConfig`` explains them.

    Raises:
        ConfigurationError: The settings cannot work.
    """
    config = load_config({"server": server, "data": data, **options})
    client = EdgeClient(config, dataset=dataset, trainer=trainer, on_progress=on_progress)
    return client.start()


def load_configured_trainer(config: SiteConfig) -> Trainer:
    """Load the training runtime that the settings name, with their number of threads.

    Raises:
        BackendUnavailableError: Its packages are missing or do not work.
    """
    return load_trainer(config.backend, config.threads)
