"""How a client meets a server, becomes a member or comes back, and changes its key."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final

from fedra_edge.api import ServerApi
from fedra_edge.config import EdgeConfig
from fedra_edge.errors import (
    ClientRevokedError,
    ConfigurationError,
    FedraEdgeError,
    JoinRefusedError,
    UnknownAuthorityError,
    UntrustedServerError,
    WorkInterrupted,
    WrongServerError,
)
from fedra_edge.home_lock import home_lock
from fedra_edge.identity import Identity
from fedra_edge.keys import ClientKey
from fedra_edge.membership import Membership
from fedra_edge.protocol.devices import DeviceProfile
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import EnrolRequest
from fedra_edge.protocol.trust import (
    Authority,
    KeyChange,
    enrolment_message,
    key_message,
    pinned_pem,
)
from fedra_edge.sessions import KeySessions
from fedra_edge.transport import Transport

LOGGER: Final = logging.getLogger(__name__)
_DAY_S: Final = 86_400
_AGAIN_S: Final = 3600.0
"""How soon a change of the key that failed is tried again."""


class Enrolment:
    """One client at one server, over connections that are told whom to trust and who we are.

    Args:
        config: The settings; they hold what a join string told.
        transport: The connections to the server.
        api: The server, over them.
        may_pin: Whether the connections are ours to choose whom to trust with.
        session: One that was handed on by an earlier program of this process.
    """

    def __init__(
        self,
        config: EdgeConfig,
        transport: Transport,
        api: ServerApi,
        *,
        may_pin: bool = True,
        session: str | None = None,
    ) -> None:
        self._config = config
        self._transport = transport
        self._api = api
        self._may_pin = may_pin and config.ca_file is None and config.server.startswith("https:")
        self._given_session = session
        self._sessions: KeySessions | None = None
        self._rotates_from = 0.0
        self.membership = Membership.of(config)
        if config.is_insecure:
            LOGGER.warning(
                "plain http to %s: everybody on the way can read and alter what is said",
                config.server,
            )

    @property
    def session(self) -> str | None:
        """The latest session, for a program that takes this one's place."""
        return self._sessions.latest if self._sessions is not None else None

    def come_back(self) -> Identity | None:
        """Be who we are; None when we are nobody yet. Nothing secret is sent.

        Raises:
            WrongServerError: Another server answers than the one we are a member of.
            IdentityError: Our files cannot be read.
        """
        identity = self.membership.load()
        if identity is None:
            return None
        if self._config.ca_sha256 not in {None, identity.ca_sha256}:
            raise WrongServerError(
                "the fingerprint in the join string is not that of the server that this home is a "
                f"member of at {self._config.server}",
                remedy="compare the join string with what headquarters gave out: it may be "
                "mistyped, or made by somebody who poses as headquarters. Give the address alone "
                "to go on as a member. Only if headquarters says that its server was set up anew, "
                "run `fedra-edge leave --forget` and join again",
            )
        self._tell_of_unused_join_string(identity)
        if self._may_pin:
            self.meet(identity.ca_sha256)
        self._sessions = KeySessions(
            self._transport, self.membership.keys, identity, self._given_session
        )
        self._transport.authenticate(self._sessions)
        return identity

    def enrol(self, profile: DeviceProfile) -> Identity:
        """Become a member, with a key that is on the disk before anybody hears of it.

        Raises:
            WrongServerError: Another server answers than the join string names.
            JoinRefusedError: The join string does not admit, or there is none.
        """
        ca_sha256 = self.meet(self._config.ca_sha256)
        keys = self.membership.keys
        try:
            client_id = self._ask_to_enrol(profile, ca_sha256, keys.current())
        except ClientRevokedError:  # a key that was removed never enrols again
            if self._config.join_secret is None:
                raise
            keys.set_aside()
            client_id = self._ask_to_enrol(profile, ca_sha256, keys.current())
        fault_point("enrol.received")
        self.membership.identity_file.save(Identity(client_id, ca_sha256, self._config.join_sha256))
        identity = self.come_back()
        assert identity is not None  # noqa: S101 (it was written just now)
        return identity

    def meet(self, ca_sha256: str | None) -> str:
        """Find out who the server is, trust it accordingly, and give the digest of its authority.

        The pinned authority is trusted, if there is one; else whom the site trusts anyway; else
        the one that ``ca_sha256`` names, which is pinned then.

        Raises:
            WrongServerError: It is another one.
            ConfigurationError: Nothing tells who it should be.
        """
        if self._may_pin:
            ca_sha256 = ca_sha256 or self.membership.pin.ca_sha256
            if ca_sha256 is not None and self._trust_pinned(ca_sha256):
                return ca_sha256
        authority, is_trusted = self._api.retried(lambda: self._ask_who(ca_sha256))
        try:
            pem = pinned_pem(authority, ca_sha256 or authority.ca_sha256)
        except ValueError as error:
            raise WrongServerError(
                f"{self._config.server} is not the server that is meant: {error}",
                remedy="compare the join string with what headquarters gave out: it may be "
                "mistyped or old, or somebody on the way poses as the server. Nothing secret was "
                "sent",
            ) from error
        if not is_trusted:
            self.membership.pin.keep(pem)
            self._trust_pinned(authority.ca_sha256)
        return authority.ca_sha256

    def rotate_key(self) -> str:
        """Put a new key in the place of the current one and give its public half.

        Whatever is killed amid it, one of the keys on the disk is the one that the server knows.
        """
        identity = self.membership.load()
        if identity is None:
            raise ConfigurationError("this client is no member", remedy="run `fedra-edge join`")
        with ExitStack() as stack:
            self._keep_others_from_it(stack)
            key = self.membership.keys.next()
            fault_point("rotate.made")
            message = key_message(identity.ca_sha256, identity.client_id, key.public_key)
            change = KeyChange(
                public_key=key.public_key,
                signature=key.sign(message),
                previous_signature=self.membership.keys.current().sign(message),
            )
            self._api.change_key(change)
            fault_point("rotate.told")
            self.membership.keys.promote(key)
        LOGGER.info("the key was changed")
        return key.public_key

    def rotate_key_when_due(self) -> None:
        """Change the key if it is old; when that fails, go on with the old one for now."""
        is_old = self.membership.keys.age_s > self._config.rotate_key_after_days * _DAY_S
        if not is_old or time.monotonic() < self._rotates_from:
            return
        self._rotates_from = time.monotonic() + _AGAIN_S
        try:
            self.rotate_key()
        except (WorkInterrupted, ClientRevokedError):
            raise
        except FedraEdgeError as error:
            LOGGER.warning("the key could not be changed; trying again in an hour: %s", error)

    def _tell_of_unused_join_string(self, identity: Identity) -> None:
        if self._config.join_sha256 not in {None, identity.join_sha256}:
            LOGGER.warning(
                "this home is the member %s already, so the join string is not used; for another "
                "member, give a --home of its own; to become one that it was made for, run "
                "`fedra-edge leave` first",
                identity.client_id,
            )

    def _ask_to_enrol(self, profile: DeviceProfile, ca_sha256: str, key: ClientKey) -> ClientId:
        config = self._config
        secret = config.join_secret.get_secret_value() if config.join_secret else None
        request = EnrolRequest(
            name=config.name,
            profile=profile,
            run=config.run,
            public_key=key.public_key,
            join_secret=secret,
            signature=key.sign(enrolment_message(ca_sha256, key.public_key, secret)),
        )
        fault_point("enrol.made")
        try:
            return ClientId(self._api.enrol(request).client_id)
        except JoinRefusedError as error:
            error.remedy = self._how_to_be_admitted(error.remedy)
            raise

    def _how_to_be_admitted(self, remedy: str) -> str:
        former = self.membership.identity_file.former_client_id()
        if former is not None:
            return (
                "ask headquarters for a join string made by `fedra-server token create --client "
                f"{former}`, which brings this site's membership back, and join with it"
            )
        if self._config.join_secret is None:
            return (
                "ask headquarters for a join string (`fedra-server token create`; for a site that "
                "was a member before, with --client NAME), and give it as --server"
            )
        return remedy

    def _ask_who(self, ca_sha256: str | None) -> tuple[Authority, bool]:
        """Ask for the authority; tell whether we trust who answered anyway."""
        try:
            return self._api.authority(), True
        except UntrustedServerError as error:
            if ca_sha256 is None or not self._may_pin:
                if isinstance(error, UnknownAuthorityError):  # waiting does not help
                    raise ConfigurationError(str(error), remedy=error.remedy) from error
                raise
        with self._trusting_anybody():
            return self._api.authority(), False

    def _trust_pinned(self, ca_sha256: str) -> bool:
        link = self.membership.link(self._config.link, ca_sha256)
        if link.is_pinned and link != self._transport.link:
            self._transport.trust(link)
        return link.is_pinned

    @contextmanager
    def _trusting_anybody(self) -> Iterator[None]:
        """Talk to whoever answers; nobody has told who we are before."""
        before = self._transport.link
        self._transport.trust(replace(before, is_verified=False))
        try:
            yield
        finally:
            self._transport.trust(before)

    def _keep_others_from_it(self, stack: ExitStack) -> None:
        """Let no other process of this home change the key at the same time."""
        try:
            stack.enter_context(home_lock(self.membership.directory))
        except ConfigurationError as error:
            raise ConfigurationError(
                "the key is being changed by another process", remedy="try again in a minute"
            ) from error
