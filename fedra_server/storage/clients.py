"""The population's records: who is enrolled, online, and how quick."""

from __future__ import annotations

from sqlalchemy import (
    ColumnElement,
    Connection,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.chain import Event, author, sha256_of
from fedra_server.errors import NotFoundError, NotPermittedError, RefusedError
from fedra_server.hiding import without_secrets
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.records import ClientRecord
from fedra_server.storage.rows import client_record, client_values

_CLIENTS = tables.clients.c
_ONE = select(tables.clients).where(_CLIENTS.client_id == bindparam("client"))
_CALIBRATION = select(tables.calibrations.c.calibration).where(
    tables.calibrations.c.client_id == bindparam("client"),
    tables.calibrations.c.model_id == bindparam("model"),
)


class ClientRecords(Database):
    """Every method is one transaction."""

    def add_client(self, record: ClientRecord, public_key: str) -> None:
        """Put a client into the population.

        Raises:
            ConflictError: The client or the key exists already.
        """
        with self.writing() as connection:
            connection.execute(insert(tables.clients).values(client_values(record, public_key)))

    def client_and_key(self, client_id: ClientId) -> tuple[ClientRecord, str] | None:
        """Give a client, also one that has left, and its key; None when there is none."""
        with self.reading() as connection:
            row = connection.execute(_ONE, {"client": client_id}).one_or_none()
        return None if row is None else (client_record(row), row.public_key)

    def client_with_key(self, public_key: str) -> ClientRecord | None:
        """Find whose key this is, also when the client has left."""
        with self.reading() as connection:
            return find_by_key(connection, public_key)

    def key_of(self, client_id: ClientId) -> str:
        """Give the key in force of a client.

        Raises:
            NotFoundError: No such client.
        """
        found = self.client_and_key(client_id)
        if found is None:
            raise NotFoundError(f"there is no client {without_secrets(client_id)}")
        return found[1]

    def change_key(self, client_id: ClientId, public_key: str, previous: str) -> None:
        """Let another key take the place of a member's, unless a third one has done so already.

        Raises:
            NotFoundError: No such client, or it has left.
            ConflictError: The key is another client's.
            RefusedError: The previous key is not in force any more.
        """
        with self.writing() as connection:
            row = connection.execute(_ONE, {"client": client_id}).one_or_none()
            if row is not None and row.public_key != previous:
                raise RefusedError(
                    ProblemCode.SIGNATURE_INVALID, "the key was changed by another request"
                )
            _update_member(connection, client_id, public_key=public_key)
            details = {"public_key_sha256": sha256_of(public_key)}
            write_entry(connection, Event.CLIENT_KEY_CHANGED, client_id, author(client_id), details)

    def client(self, client_id: ClientId) -> ClientRecord:
        """Give a client, also one that has left.

        Raises:
            NotFoundError: No such client.
        """
        with self.reading() as connection:
            return find_client(connection, client_id)

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
            NotPermittedError: It would take another member's name.
        """
        values = {"profile": profile.model_dump_json(), "run": run}
        if name is not None:
            values["name"] = name
        forget = delete(tables.calibrations).where(tables.calibrations.c.client_id == client_id)
        with self.writing() as connection:
            if name is not None and name != find_client(connection, client_id).name:
                require_free_name(connection, name)
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

    def leave(self, client_id: ClientId, now: float, *, removed_by: str | None = None) -> None:
        """End a membership for good: neither its key nor its sessions open anything from now on.

        Raises:
            NotFoundError: No such client, or it has left already.
        """
        with self.writing() as connection:
            _update_member(connection, client_id, is_online=False, has_left=True, last_seen_at=now)
            event = Event.CLIENT_LEFT if removed_by is None else Event.CLIENT_REMOVED
            write_entry(connection, event, client_id, removed_by or author(client_id))

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
            find_client(connection, client_id)
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


def find_by_key(connection: Connection, public_key: str) -> ClientRecord | None:
    """Find inside a transaction whose key this is."""
    query = select(tables.clients).where(_CLIENTS.public_key == public_key)
    row = connection.execute(query).one_or_none()
    return None if row is None else client_record(row)


def require_free_name(connection: Connection, name: str) -> None:
    """Refuse to rename a member to what an operator means another member by.

    Raises:
        NotPermittedError: It is one's name, whatever its capitals, or its id.
    """
    is_taken = or_(func.lower(_CLIENTS.name) == name.lower(), _CLIENTS.client_id == name)
    _require_none(connection, is_taken, name)


def require_no_id(connection: Connection, name: str) -> None:
    """Refuse the id of a member as the name of a new one.

    Two members of one name are told apart by their ids; machines have the same host name often.

    Raises:
        NotPermittedError: It is one's id.
    """
    _require_none(connection, _CLIENTS.client_id == name, name)


def _require_none(connection: Connection, condition: ColumnElement[bool], name: str) -> None:
    query = select(func.count()).where(condition, _CLIENTS.has_left.is_(False))
    if connection.execute(query).scalar_one():
        raise NotPermittedError(
            f"another member is named {without_secrets(name)} already",
            remedy="Give this site a name of its own with --name; if it is that member, say after "
            f"a disk swap, ask the operator for 'fedra-server token create --client {name}'.",
        )


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
    return find_client(connection, client_id)


def find_client(connection: Connection, client_id: ClientId) -> ClientRecord:
    """Read a client inside a transaction, also one that has left."""
    row = connection.execute(_ONE, {"client": client_id}).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no client {without_secrets(client_id)}")
    return client_record(row)
