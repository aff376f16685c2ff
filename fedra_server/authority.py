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
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
    wanted = frozenset(map(_checked_name, names))
    if _is_due(files.server, files.certificate, wanted, lifetime, now):
        write_durably(files.server, _issue(files, wanted, lifetime, now), is_private=True)
    return files.server


def certificate_names(path: Path) -> frozenset[str]:
    """Give the host names and addresses that a certificate is for; none where it is no good."""
    leaf = _read_leaf(path)
    return frozenset() if leaf is None else _names_of(leaf)


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


def _is_due(
    path: Path, ca: Path, wanted: frozenset[str], lifetime: timedelta, now: datetime
) -> bool:
    leaf = _read_leaf(path)
    if leaf is None or not wanted <= _names_of(leaf):
        return True
    if ca.read_bytes().strip() not in path.read_bytes():  # issued by an authority of before
        return True
    left = leaf.not_valid_after_utc - now
    is_young = lifetime * _RENEWED_FROM <= left <= lifetime and leaf.not_valid_before_utc <= now
    return not (is_young and _has_key_of(path, leaf))


def _issue(
    files: AuthorityFiles, names: frozenset[str], lifetime: timedelta, now: datetime
) -> bytes:
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
    chain = (leaf, authority)
    return _key_pem(key) + b"".join(it.public_bytes(serialization.Encoding.PEM) for it in chain)


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


def _read_leaf(path: Path) -> x509.Certificate | None:
    """Read the first certificate of a file; None when there is none that can be read."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError):
        return None


def _has_key_of(path: Path, leaf: x509.Certificate) -> bool:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        return False
    return key.public_key() == leaf.public_key()


def _names_of(leaf: x509.Certificate) -> frozenset[str]:
    from cryptography import x509

    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()
    hosts = names.get_values_for_type(x509.DNSName)
    return frozenset((*hosts, *map(str, names.get_values_for_type(x509.IPAddress))))


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
