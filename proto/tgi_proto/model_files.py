"""Opens files of a model directory as what they are: made by somebody else.

A pipe never answers and a device never ends, so only regular files are opened (links are followed: the Hub's cache is
made of them), and what is read as a whole has an upper size. Used by launcher, router and shard, before parsing; what
a file means, and how an error is told, is theirs.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 100_000_000  # of a configuration or an index; the largest known have some 10 MB


def open_file(path: Path) -> BinaryIO:
    """`path` for reading. Raises OSError with a `strerror`, also when it is no regular file."""
    # Without O_NONBLOCK opening a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """All of `path`. Raises OSError as `open_file`, and when it has more than MAX_BYTES."""
    with open_file(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES} bytes", str(path))
    return content
