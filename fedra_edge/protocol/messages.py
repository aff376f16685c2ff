"""The bodies of requests and responses that are no thing of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedra_edge.protocol.devices import DeviceProfile
from fedra_edge.protocol.trust import JoinSecret, PublicKey, Signature
from fedra_edge.protocol.wire import ByteCount, Count, Detail, ShortText, Token, WireModel

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class EnrolRequest(WireModel):
    """Asks for membership in the population. ``run`` binds the client to one run.

    The key signs ``("enrol", ca_sha256, public_key, sha256 of the join secret)``. Repeating it
    with the same key and secret, after a lost answer, gives the same membership.
    """

    name: SiteName
    profile: DeviceProfile
    run: RunName | None = None
    public_key: PublicKey
    join_secret: JoinSecret | None = Field(default=None, repr=False)
    signature: Signature


class EnrolReceipt(WireModel):
    """Membership; whoever holds the key that enrolled is this client from now on."""

    client_id: Token


class RejoinRequest(WireModel):
    """An enrolled client is back, perhaps on a changed machine; without a name it keeps its own."""

    profile: DeviceProfile
    run: RunName | None = None
    name: SiteName | None = None


class Heartbeat(WireModel):
    """A participant is alive and this far with its assignment."""

    assignment_id: Token
    steps_done: Count
    steps_total: Count


class HeartbeatReceipt(WireModel):
    """Tells whether the round still waits for this assignment; if not, training may stop."""

    is_wanted: bool


class FailureReport(WireModel):
    """A participant could not finish its assignment; the round should not wait for it."""

    detail: Detail


class UploadStatus(WireModel):
    """Where an upload stands: how many bytes the server holds durably."""

    upload_id: Token
    offset_bytes: ByteCount
    size_bytes: ByteCount


class DeltaReceipt(WireModel):
    """The delta is on the server's disk and admitted; it will be merged exactly once.

    ``staleness`` is given when it came after its round: how often a piece of it was merged since
    the revision that it was trained from, at most. The staler, the less it weighs.
    """

    assignment_id: Token
    status: Literal["admitted"] = "admitted"
    staleness: Count | None = None


class ClientStatus(WireModel):
    """What the server knows of a client, told to that client."""

    client_id: Token
    name: SiteName
    run: RunName | None
    is_online: bool
    rounds_contributed: Count
    open_assignment: Token | None


class Health(WireModel):
    """Whether the server can serve; ``detail`` says what is wrong when it cannot."""

    status: Literal["ok", "unavailable"]
    version: ShortText
    protocol: ShortText
    detail: Detail = ""
