"""How a client reaches its servers: addresses, TLS, token, headers, compression, shared memory.

>>> Classifier(Connection(urls=("a.example:8001", "b.example:8001"), tls=True, token_file=Path("/run/secrets/token")))
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from clipship.core.errors import UsageError

MAX_MESSAGE_BYTES = 2**31 - 1
"""gRPC's upper limit of a message; its default is 4 MB."""

Compression = Literal["none", "gzip", "deflate"]

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_URL = re.compile(r"(?P<scheme>grpcs?://)?(?P<address>\[[0-9A-Fa-f:.]+\]:\d+|[^\s:/\[\]]+:\d+|unix:\S+)")
_SECRET_HEADER = re.compile(r"(proxy-)?authorization|cookie|(x-)?api-key|triton-grpc-protocol-.*")
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_PRINTABLE_ASCII = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """The gRPC endpoints of one or more Tritons that serve the same bundle, and how to connect to them.

    Raises:
        UsageError: an address, header or token is invalid, a file is missing, or a secret would travel in plain text.
    """

    urls: tuple[str, ...]
    """HOST:PORT each; grpcs://HOST:PORT means TLS. Load is balanced over them; a failing server is ejected."""
    tls: bool = False
    """Encrypt, and verify the server's certificate. Implied by the files below and by grpcs://."""
    ca_file: Path | None = None
    """CA certificates (PEM) to verify the server with; None: the system's."""
    certificate_file: Path | None = None
    """This client's certificate chain (PEM), for servers that require one (mTLS)."""
    key_file: Path | None = None
    """The private key (PEM) of ``certificate_file``."""
    server_name: str | None = None
    """The name in the server's certificate, if it is not the address's host."""
    token: str | None = field(default=None, repr=False)
    """Sent as ``authorization: Bearer TOKEN`` with every call."""
    token_file: Path | None = None
    """A file with the token, read for every call: it may be replaced at any time."""
    token_in_plain_text: bool = False
    """Allow sending the token (or a header with a secret) to other hosts without TLS."""
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS, repr=False, hash=False)
    """Sent with every call; names in lower case."""
    compression: Compression = "none"
    """Of requests. Costs CPU time; pixels shrink somewhat, encoded images do not."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """The largest request and response."""
    connect_timeout_s: float = 5.0
    """Timeout of calls other than inference."""
    shared_memory: bool = False
    """Pass pixels to a server on this machine in system shared memory; if it refuses, in messages."""

    def __post_init__(self) -> None:
        if isinstance(self.urls, str) or not self.urls:
            raise UsageError(f"urls is {self.urls!r}: give a tuple of HOST:PORT, at least one")
        for url in self.urls:
            address_of(url)
        if self.compression not in ("none", "gzip", "deflate"):
            raise UsageError(f"compression is {self.compression!r}: give none, gzip or deflate")
        if not 0 < self.max_message_bytes <= MAX_MESSAGE_BYTES or self.connect_timeout_s <= 0:
            raise UsageError(
                f"max_message_bytes {self.max_message_bytes}, connect_timeout_s {self.connect_timeout_s:g}: "
                f"give positive numbers, at most {MAX_MESSAGE_BYTES} bytes"
            )
        self._validate_files()
        self._validate_headers()
        self._validate_secrets()

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        files = (self.ca_file, self.certificate_file, self.key_file)
        return self.tls or any(files) or any(url.startswith("grpcs://") for url in self.urls)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The ``urls`` without their schemes, each once."""
        return tuple(dict.fromkeys(address_of(url) for url in self.urls))

    def _validate_files(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise UsageError("certificate_file and key_file go together: give both, or neither")
        if self.server_name is not None and not self.secure:
            raise UsageError(f"server_name {self.server_name!r} is checked under TLS only: give tls or ca_file too")
        if self.token is not None and self.token_file is not None:
            raise UsageError("token and token_file were both given: give one")
        for file in (self.ca_file, self.certificate_file, self.key_file, self.token_file):
            if file is not None and not Path(file).is_file():
                raise UsageError(f"{file}: no such file: give the path of a PEM file, or of the token's file")
        if self.token is not None:
            validate_token(self.token, "the token")

    def _validate_headers(self) -> None:
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
                raise UsageError(
                    f"header {name!r}: give a name of lower-case letters, digits and -_. (not grpc-*, *-bin)"
                )
            if not _PRINTABLE_ASCII.fullmatch(value):
                raise UsageError(f"header {name!r}: its value has characters other than printable ASCII")

    def _validate_secrets(self) -> None:
        secrets = [name for name in self.headers if _SECRET_HEADER.fullmatch(name)]
        if self.token is not None or self.token_file is not None:
            secrets.insert(0, "token")
        if not secrets or self.secure or self.token_in_plain_text:
            return
        far = [address for address in self.addresses if not is_loopback(address)]
        if far:
            raise UsageError(
                f"the {secrets[0]} would travel to {', '.join(far)} in plain text: use TLS (tls, ca_file), "
                "or ask for it with token_in_plain_text"
            )


def connection_from_text(text: str) -> Connection:
    """A connection from HOST:PORT, or several separated by commas.

    Raises:
        UsageError: as :class:`Connection`.
    """
    return Connection(urls=tuple(part.strip() for part in text.split(",")))


def address_of(url: str) -> str:
    """``url`` without its scheme.

    Raises:
        UsageError: it is not HOST:PORT.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise UsageError(f"{url!r} is not the address of a gRPC server: give HOST:PORT, such as 127.0.0.1:8001")
    return match["address"]


def is_loopback(address: str) -> bool:
    """Whether ``address`` (HOST:PORT) names this machine; no name is resolved."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def validate_token(token: str, source: str) -> None:
    """Raise :class:`UsageError`, without the token in it, if the token is not valid in a header."""
    if not _VISIBLE_ASCII.fullmatch(token):
        raise UsageError(f"{source} is empty or has blanks or characters other than ASCII: give the token alone")
