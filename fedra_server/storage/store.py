"""The server's records behind one door: every method of Store is one transaction."""

from __future__ import annotations

from pathlib import Path

from fedra_server.config import ServerHome
from fedra_server.storage.clients import ClientRecords
from fedra_server.storage.durability import (
    disk_errors,
    make_directory,
    make_private,
    sync_directory,
)
from fedra_server.storage.evaluations import EvaluationRecords
from fedra_server.storage.evidence import Evidence
from fedra_server.storage.histories import RunHistories
from fedra_server.storage.migrating import migrate
from fedra_server.storage.models import ModelRecords
from fedra_server.storage.operators import OperatorRecords
from fedra_server.storage.progress import ProgressRecords
from fedra_server.storage.retention import Retention
from fedra_server.storage.rounds import RoundRecords
from fedra_server.storage.runs import RunRecords
from fedra_server.storage.screenings import ScreeningRecords
from fedra_server.storage.tallies import Tallies
from fedra_server.storage.tokens import TokenRecords
from fedra_server.storage.trails import Trails
from fedra_server.storage.uploads import UploadRecords


class Store(
    ClientRecords,
    TokenRecords,
    ModelRecords,
    RunRecords,
    RoundRecords,
    ScreeningRecords,
    ProgressRecords,
    UploadRecords,
    EvaluationRecords,
    RunHistories,
    Trails,
    Retention,
    Evidence,
    OperatorRecords,
    Tallies,
):
    """The records of one server.

    When a method returns, what it wrote survives a power cut. Several processes and threads
    may use the same database at once; a writer waits up to ten seconds for another.
    """

    @classmethod
    def open(cls, home: Path, url: str | None = None) -> Store:
        """Open a home's database, the embedded one unless a URL is given, and migrate it.

        Raises:
            ConfigurationError: The URL, its driver or the database's version cannot work.
            StorageError: Disk or database refused.
        """
        with disk_errors("opening the server's home"):
            make_directory(home)
            if url is None:  # what SQLite adds to it has the same mode
                make_private(ServerHome(home).database_file)
            store = cls(url or ServerHome(home).database_url)
            try:
                migrate(store)
                sync_directory(home)
            except BaseException:
                store.close()
                raise
        return store
