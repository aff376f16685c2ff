"""The population's records: who is enrolled, online, and how quick."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.ids import ClientId
from fedra_server.errors import NotFoundError
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.records import ClientRecord
from fedra_server.storage.rows import client_record, client_values

_CLIENTS = tables.clients.c
_MEMBER = select(tables.clients).where(
    _CLIENTS.credential_sha256 == bindparam("credential"), _CLIENTS.has_left.is_(False)
)
_CALIBRATION = select(tables.calibrations.c.calibration).where(
    tables.calibrations.c.client_id == bindparam("client"),
    tables.calibrations.c.model_id == bindparam("model"),
)


class ClientRecords(Database):
    """Every method is one transaction."""

    def add_client(self, record: ClientRecord, credential_sha256: str) -> None:
        """Enrol a client; the store knows its credential by digest only.

        Raises:
            ConflictError: The client or the credential exists already.
        """
        with self.writing() as connection:
            connection.execute(
                insert(tables.clients).values(client_values(record, credential_sha256))
            )

    def client_by_credential(self, credential_sha256: str) -> ClientRecord | None:
        """Find the member a credential belongs to; one that has left is no member."""
        with self.reading() as connection:
            row = connection.execute(_MEMBER, {"credential": credential_sha256}).one_or_none()
        return None if row is None else client_record(row)

    def client(self, client_id: ClientId) -> ClientRecord:
        """Give a client, also one that has left.

        Raises:
            NotFoundError: No such client.
        """
        with self.reading() as connection:
            return _client(connection, client_id)

    def clients(self, *, include_left: bool = False) -> list[ClientRecord]:
        """Give the population, in the order of enrolment."""
        query = select(tables.clients).order_by(_CLIENTS.enrolled_at, _CLIENTS.client_id)
        if not include_left:
            query = query.where(_CLIENTS.has_left.is_(False))
        with self.reading() as connection:
            return [client_record(row) for row in connection.execute(query).all()]

    def rejoin(
        self,
        client_id: ClientId,
        profile: DeviceProfile,
        run: str | None,
        now: float,
        name: str | None = None,
    ) -> ClientRecord:
        """Note that a client is back; it is online from here, and measures models anew.

        Its machine and its data may have changed, so earlier calibrations are forgotten. It
        keeps its name unless it gives another.

        Raises:
            NotFoundError: No such client, or it has left.
        """
        values = {"profile": profile.model_dump_json(), "run": run}
        if name is not None:
            values["name"] = name
        forget = delete(tables.calibrations).where(tables.calibrations.c.client_id == client_id)
        with self.writing() as connection:
            connection.execute(forget)
            return _update_member(connection, client_id, is_online=True, last_seen_at=now, **values)

    def touch(self, client_id: ClientId, now: float) -> None:
        """Note a sign of life.

        Raises:
            NotFoundError: No such client, or it has left.
        """
        with self.writing() as connection:
            _update_member(connection, client_id, is_online=True, last_seen_at=now)

    def cap_last_seen(self, now: float) -> None:
        """Make nobody seen later than now, for when the machine's clock was set back."""
        change = update(tables.clients).where(_CLIENTS.last_seen_at > now)
        with self.writing() as connection:
            connection.execute(change.values(last_seen_at=now))

    def set_offline(self, client_id: ClientId, now: float) -> None:
        """Note that a client said it goes offline.

        Raises:
            NotFoundError: No such client, or it has left.
        """
        with self.writing() as connection:
            _update_member(connection, client_id, is_online=False, last_seen_at=now)

    def leave(self, client_id: ClientId, now: float) -> None:
        """End a membership for good: the credential opens nothing from now on.

        Raises:
            NotFoundError: No such client, or it has left already.
        """
        with self.writing() as connection:
            _update_member(connection, client_id, is_online=False, has_left=True, last_seen_at=now)

    def rounds_contributed(self, client_id: ClientId) -> int:
        """Count the deltas of a client that were merged."""
        query = select(func.count()).where(
            tables.assignments.c.client_id == client_id,
            tables.assignments.c.state == AssignmentState.MERGED.value,
        )
        with self.reading() as connection:
            return connection.execute(query).scalar_one()

    def set_calibration(self, client_id: ClientId, calibration: Calibration) -> None:
        """Keep what a client measured of a model, in place of what it measured before.

        Raises:
            NotFoundError: No such client.
        """
        columns = tables.calibrations.c
        values = {"calibration": calibration.model_dump_json()}
        keys = {"client_id": client_id, "model_id": calibration.model_id}
        change = update(tables.calibrations).where(
            columns.client_id == client_id, columns.model_id == calibration.model_id
        )
        with self.writing() as connection:
            _client(connection, client_id)
            if connection.execute(change.values(values)).rowcount == 0:
                connection.execute(insert(tables.calibrations).values({**keys, **values}))

    def calibration(self, client_id: ClientId, model_id: str) -> Calibration | None:
        """Give what one client measured of a model."""
        wanted = {"client": client_id, "model": model_id}
        with self.reading() as connection:
            text = connection.execute(_CALIBRATION, wanted).scalar_one_or_none()
        return None if text is None else Calibration.model_validate_json(text)

    def calibrations(self, model_id: str) -> dict[ClientId, Calibration]:
        """Give what each member measured of a model."""
        with self.reading() as connection:
            return find_calibrations(connection, model_id)


def find_calibrations(connection: Connection, model_id: str) -> dict[ClientId, Calibration]:
    """Read inside a transaction what each member measured of a model."""
    query = (
        select(tables.calibrations)
        .join(tables.clients)
        .where(tables.calibrations.c.model_id == model_id, _CLIENTS.has_left.is_(False))
    )
    return {
        ClientId(row.client_id): Calibration.model_validate_json(row.calibration)
        for row in connection.execute(query).all()
    }


def _update_member(connection: Connection, client_id: ClientId, **values: object) -> ClientRecord:
    change = update(tables.clients).where(
        _CLIENTS.client_id == client_id, _CLIENTS.has_left.is_(False)
    )
    if connection.execute(change.values(values)).rowcount == 0:
        raise NotFoundError(f"there is no member {client_id}")
    return _client(connection, client_id)


def _client(connection: Connection, client_id: ClientId) -> ClientRecord:
    query = select(tables.clients).where(_CLIENTS.client_id == client_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no client {client_id}")
    return client_record(row)
