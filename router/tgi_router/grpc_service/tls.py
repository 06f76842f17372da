"""Certificate and key of the gRPC port, read again when their files change, so that a renewal needs no restart.

Used by listening.py.
"""

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from ..errors import StartupError

logger = logging.getLogger(__name__)


def credentials(cert: str, key: str) -> Any:
    """Credentials for grpc. cert, key: paths of PEM files. Raises StartupError when they are no pair."""
    files = _Files(Path(cert), Path(key))
    return grpc.dynamic_ssl_server_credentials(files.read(), files.read_if_changed)


class _Files:
    """The two files, and how they were when they were read last."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._stamp: tuple[tuple[int, int], ...] = ()

    def read(self) -> Any:
        """Both, as grpc wants them. Raises StartupError: grpc says only in its own log what is wrong with them."""
        flags = f"`--grpc-tls-cert` {self._cert} and `--grpc-tls-key` {self._key}"
        try:
            self._stamp = self._stamps()
            # The password of a protected key is not asked for: nobody would hear the question.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key, password="")
            pair = (self._key.read_bytes(), self._cert.read_bytes())
            if self._stamps() != self._stamp:
                raise OSError("they are just being changed")
        except ssl.SSLError as error:
            raise StartupError(f"{flags} are no pair: {error}") from error
        except OSError as error:
            raise StartupError(f"{flags} cannot be read: {error}") from error
        return grpc.ssl_server_certificate_configuration([pair])

    def read_if_changed(self) -> Any:
        """grpc asks before each handshake, on a thread of its own; None: go on with what you have."""
        try:
            if self._stamps() == self._stamp:
                return None
            renewed = self.read()
        except (OSError, StartupError) as error:  # half-way through a renewal, perhaps
            logger.warning("the gRPC port goes on with its old certificate: %s", error)
            return None
        logger.info("The gRPC port has a new certificate from %s", self._cert)
        return renewed

    def _stamps(self) -> tuple[tuple[int, int], ...]:
        """Times of change and inodes."""
        return tuple((status.st_mtime_ns, status.st_ino) for status in (self._cert.stat(), self._key.stat()))
