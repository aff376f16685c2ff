"""The server's certificate authority, and the certificates that it gives the server.

The authority is made once for a home and lasts ten years; sites pin its digest, so certificates
below it come and go without them. Its key stays in the home, readable by its owner only.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict

from fedra_edge.protocol.trust import Authority, certificate_sha256
from fedra_server.config import ServerHome
from fedra_server.errors import ConfigurationError
from fedra_server.storage.durability import disk_errors, sync_directory, write_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_AUTHORITY_LIFETIME: Final = timedelta(days=3650)
_SKEW: Final = timedelta(hours=12)
"""How far behind a site's clock may be; certificates begin so much earlier."""
_RENEWED_FROM: Final = 1 / 3
"""A certificate is renewed when less than this part of its life is left."""
_HOST_NAME: Final = re.compile(
    r"(?=.{1,253}$)(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.)*"
    r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
)
_REMEDY: Final = (
    "Restore the folder from a backup of this home. Or delete it and run 'fedra-server init': that "
    "makes a new authority, which every site must join anew."
)


@dataclass(frozen=True)
class AuthorityFiles:
    """Where the authority of a home keeps what it has."""

    directory: Path

    @classmethod
    def of(cls, home: ServerHome) -> AuthorityFiles:
        """Name the place in a home."""
        return cls(home.path / "authority")

    @property
    def certificate(self) -> Path:
        """The authority's certificate, which anyone may have."""
        return self.directory / "ca.pem"

    @property
    def key(self) -> Path:
        """The authority's key."""
        return self.directory / "ca.key"

    @property
    def server(self) -> Path:
        """The server's key, its certificate and the authority's, in this order."""
        return self.directory / "server.pem"

    @property
    def issued(self) -> Path:
        """What is in the server's certificate, for who would not load a library to read it."""
        return self.directory / "issued.json"


class _Issued(BaseModel):
    """What there is to know of the certificate in a file, which no other content has."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    file_sha256: str
    names: frozenset[str]
    valid_from: AwareDatetime
    valid_until: AwareDatetime


def ensure_authority(home: ServerHome) -> Authority:
    """Give a home's authority; a home that has none gets one.

    Raises:
        ConfigurationError: A file of it is missing or damaged.
        StorageError: The disk refused.
    """
    files = AuthorityFiles.of(home)
    if not files.directory.exists():
        _make(files, datetime.now(UTC))
    return read_authority(home)


def read_authority(home: ServerHome) -> Authority:
    """Give the authority of a home that has one.

    Raises:
        ConfigurationError: A file of it is missing or damaged.
    """
    files = AuthorityFiles.of(home)
    for path in (files.certificate, files.key):
        if not path.is_file():
            raise ConfigurationError(f"{path} is missing", remedy=_REMEDY)
    try:
        pem = files.certificate.read_text(encoding="ascii")
        return Authority(ca_pem=pem, ca_sha256=certificate_sha256(pem))
    except (OSError, ValueError) as error:
        raise _damaged(files.certificate) from error


def refresh_certificate(
    home: ServerHome, names: Iterable[str], lifetime: timedelta, now: datetime
) -> Path:
    """Give the file with the server's key and chain; it is issued anew when that is due.

    Raises:
        ConfigurationError: The authority is damaged, has expired, or a name is none.
        StorageError: The disk refused.
    """
    files = AuthorityFiles.of(home)
    if is_certificate_due(home, names, lifetime, now):
        pem, issued = _issue(files, _checked_names(names), lifetime, now)
        write_durably(files.server, pem, is_private=True)
        write_durably(files.issued, issued.model_dump_json().encode())
    return files.server


def is_certificate_due(
    home: ServerHome, names: Iterable[str], lifetime: timedelta, now: datetime
) -> bool:
    """Tell whether the server's certificate is to be issued anew; this needs no library.

    Raises:
        ConfigurationError: The authority cannot be read, or a name is none.
    """
    files = AuthorityFiles.of(home)
    wanted = _checked_names(names)
    issued = _read_issued(files)
    if issued is None or not wanted <= issued.names:
        return True
    left = issued.valid_until - now
    return not (lifetime * _RENEWED_FROM <= left <= lifetime and issued.valid_from <= now)


def certificate_names(home: ServerHome) -> frozenset[str]:
    """Give the names and addresses that the server's certificate is for; none if it is no good."""
    issued = _read_issued(AuthorityFiles.of(home))
    return frozenset() if issued is None else issued.names


def _read_issued(files: AuthorityFiles) -> _Issued | None:
    """Read what the authority there is has issued; None unless the files agree."""
    try:
        issued = _Issued.model_validate_json(files.issued.read_bytes())
        pem, authority = files.server.read_bytes(), files.certificate.read_bytes()
    except (OSError, ValueError):
        return None
    agree = sha256(pem).hexdigest() == issued.file_sha256 and pem.endswith(authority)
    return issued if agree else None


def _make(files: AuthorityFiles, now: datetime) -> None:
    """Make the authority beside its place, then move it there, so that it is never half there."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"fedra {secrets.token_hex(4)}")]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    new = AuthorityFiles(files.directory.with_name(f".authority.{secrets.token_hex(4)}.part"))
    with disk_errors(f"making the certificate authority {files.directory}"):
        try:
            new.directory.mkdir(parents=True, mode=0o700)
            write_durably(new.key, _key_pem(key), is_private=True)
            write_durably(new.certificate, certificate.public_bytes(serialization.Encoding.PEM))
            _move_unless_there(new.directory, files.directory)
        finally:
            shutil.rmtree(new.directory, ignore_errors=True)


def _move_unless_there(new: Path, place: Path) -> None:
    try:
        new.rename(place)
    except OSError:
        if not place.exists():  # another process has not been quicker
            raise
    sync_directory(place.parent)


def _issue(
    files: AuthorityFiles, names: frozenset[str], lifetime: timedelta, now: datetime
) -> tuple[bytes, _Issued]:
    """Make a new key and a certificate for it; give them in PEM, the authority's at the end."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority, authority_key = _load(files, now)
    key = ec.generate_private_key(ec.SECP256R1())
    extensions = (
        (x509.SubjectAlternativeName([_general_name(name) for name in sorted(names)]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(is_authority=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False),
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedra-server")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(now + lifetime, authority.not_valid_after_utc))
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    leaf = builder.sign(authority_key, hashes.SHA256())
    certificate = leaf.public_bytes(serialization.Encoding.PEM)
    pem = _key_pem(key) + certificate + files.certificate.read_bytes()
    return pem, _Issued(
        file_sha256=sha256(pem).hexdigest(),
        names=names,
        valid_from=leaf.not_valid_before_utc,
        valid_until=leaf.not_valid_after_utc,
    )


def _load(files: AuthorityFiles, now: datetime) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        authority = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = load_pem_private_key(files.key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(files.key) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise ConfigurationError(
            f"{files.key} is not the key of {files.certificate.name}", remedy=_REMEDY
        )
    if not authority.not_valid_before_utc <= now < authority.not_valid_after_utc:
        raise ConfigurationError(
            f"by this machine's clock, {now:%Y-%m-%d %H:%M} UTC, the certificate authority in "
            f"{files.directory} is not valid",
            remedy=f"Set the clock. If it is right: {_REMEDY}",
        )
    return authority, key


def _checked_names(names: Iterable[str]) -> frozenset[str]:
    return frozenset(map(_checked_name, names))


def _checked_name(name: str) -> str:
    """Write a name as certificates hold it."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if _HOST_NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"{name[:80]!r} is no host name and no IP address",
            remedy="Give names as sites type them, without scheme and port, such as hq.example.",
        )
    return name.lower()


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _damaged(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot be read or is damaged", remedy=_REMEDY)
