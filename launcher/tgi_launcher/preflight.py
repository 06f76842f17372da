"""What would make a start fail later, found before anything is loaded: taken ports and sockets, limits, small /dev/shm.

Raises ArgumentValidation with one sentence, or returns warnings. Also owns the lock that keeps two launchers from using
the same sockets. Called by launch.
"""

import fcntl
import os
from pathlib import Path

from tgi_proto.channel import socket_path

from .checks import resolve_hostname
from .errors import ArgumentValidation
from .flags import Flags
from .memory_fit import GIB, gib
from .resources import free_port, open_files_limit, port_objection, shm_bytes, socket_answers

LEAST_FILES = 4096
_MAX_SOCKET_PATH = 107  # sockaddr_un holds 108 bytes with the final zero


def check_files(flags: Flags) -> None:
    """Raises ArgumentValidation when a file that was named is not there."""
    for name in ("tokenizer_config_path", "grpc_tls_cert", "grpc_tls_key"):
        path = getattr(flags, name)
        if path is not None and not Path(path).is_file():
            raise ArgumentValidation(f"`{name}` is '{path}', but there is no such file")


def check_ports(flags: Flags) -> None:
    """Raises ArgumentValidation when a port we are to listen on is taken."""
    host, _, _ = resolve_hostname(flags)
    ports = {"port": flags.listen_port}
    if flags.given("prometheus_port") and flags.prometheus_port != flags.listen_port:
        ports["prometheus_port"] = flags.prometheus_port
    if flags.grpc_port is not None:
        ports["grpc_port"] = flags.grpc_port
    for name, port in ports.items():
        objection = port_objection(host, port)
        if objection is not None:
            raise ArgumentValidation(
                f"`{name}` {port} cannot be listened on at {host}: {objection}. "
                f"Stop what uses it, or choose another with --{name.replace('_', '-')}"
            )


def master_port(flags: Flags, world_size: int) -> int:
    """Where the shards meet: the port asked for, or another one when nobody asked and the default is taken.

    Raises ArgumentValidation when the port asked for is taken.
    """
    local = flags.master_addr in ("localhost", "127.0.0.1")
    if world_size == 1 or not local:
        return flags.master_port
    objection = port_objection("127.0.0.1", flags.master_port)
    if objection is None:
        return flags.master_port
    if not flags.given("master_port"):
        return free_port()
    raise ArgumentValidation(
        f"`master_port` {flags.master_port} cannot be listened on: {objection}. "
        "Another group of shards probably uses it; choose another with --master-port"
    )


def machine_warnings(world_size: int, device: str) -> list[str]:
    """Limits of this machine that will hurt under load."""
    warnings = []
    files = open_files_limit()
    if files < LEAST_FILES:
        warnings.append(
            f"only {files} file descriptors may be open, so at most about {files // 2} clients can be connected: "
            f"raise the limit (ulimit -n {LEAST_FILES}, docker run --ulimit nofile=65536)"
        )
    shm = shm_bytes()
    if world_size > 1 and device == "cuda" and (shm is None or shm < GIB):
        size = "absent" if shm is None else f"only {gib(shm)}"
        warnings.append(f"/dev/shm is {size}, and NCCL shares memory through it: docker run --shm-size 1g")
    return warnings


class SocketLock:
    """Exclusive use of the sockets `{prefix}-{rank}` of this machine, for as long as this process lives.

    The lock is the kernel's (flock), so it ends with the process however that dies; a stale file is no obstacle.
    """

    def __init__(self, prefix: str, world_size: int) -> None:
        """Raises ArgumentValidation when another launcher or live shards use the prefix, or nobody can."""
        longest = socket_path(prefix, world_size - 1)
        if len(os.fsencode(longest)) > _MAX_SOCKET_PATH:
            raise ArgumentValidation(
                f"`shard_uds_path` is too long: a socket's path may have {_MAX_SOCKET_PATH} bytes, '{longest}' has "
                f"{len(os.fsencode(longest))}"
            )
        self.path = f"{prefix}.lock"
        self._file = self._lock(prefix)
        for rank in range(world_size):
            path = Path(socket_path(prefix, rank))
            if path.is_socket():
                if socket_answers(str(path)):
                    self.release()
                    raise _in_use(prefix, f"a live process answers at {path}")
                path.unlink()
            elif path.exists():
                self.release()
                raise ArgumentValidation(f"`shard_uds_path`: {path} exists and is no socket; choose another prefix")

    def _lock(self, prefix: str) -> int:
        while True:
            try:
                Path(prefix).parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ArgumentValidation(f"`shard_uds_path` '{prefix}' cannot be used: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                raise _in_use(prefix, "another launcher holds it") from error
            try:
                if os.stat(self.path).st_ino == os.fstat(file).st_ino:
                    return file
            except FileNotFoundError:
                pass  # its previous owner removed it between our open and our lock: take a fresh one
            os.close(file)

    def release(self) -> None:
        """Gives the prefix back."""
        Path(self.path).unlink(missing_ok=True)
        os.close(self._file)


def _in_use(prefix: str, who: str) -> ArgumentValidation:
    return ArgumentValidation(
        f"`shard_uds_path` '{prefix}' is in use: {who}. Stop that server, or give this one a prefix of its own with "
        "--shard-uds-path"
    )
