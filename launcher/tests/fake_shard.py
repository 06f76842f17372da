"""A shard without a model, for tests of the launcher: emits the events, binds its socket, ends as it is told.

Behaviour comes from FAKE_SHARD, `WHAT[@rank][#n]` items separated by spaces; `#n` limits an item to the n-th start of
that rank (counted in files under FAKE_DIR). `import:kill` acts in that phase, `ready:exit3` after it.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from tgi_proto import logs
from tgi_proto.argv import from_argv
from tgi_proto.channel import socket_path
from tgi_shard.config import ShardConfig

config = from_argv(ShardConfig, sys.argv[1:], prog="fake_shard")
log = logs.setup("tgi_shard", config.log_level, rank=config.rank)
folder = Path(os.environ["FAKE_DIR"])
starts = len(list(folder.glob(f"shard-{config.rank}.start-*"))) + 1
(folder / f"shard-{config.rank}.start-{starts}").write_text(str(os.getpid()))


def actions(phase: str) -> list[str]:
    found = []
    for item in os.environ.get("FAKE_SHARD", "").split():
        what, _, n = item.partition("#")
        what, _, rank = what.partition("@")
        where, _, action = what.partition(":")
        if where == phase and rank in ("", str(config.rank)) and n in ("", str(starts)):
            found.append(action)
    return found


def act(phase: str) -> None:
    for action in actions(phase):
        if action.startswith("exit"):
            print("something went wrong", file=sys.stderr, flush=True)
            os._exit(int(action[4:]))
        elif action == "raise":
            raise ValueError("tensor model.norm.weight is missing")
        elif action == "logged":
            log.critical("model.safetensors lacks `model.norm.weight`")
            os._exit(1)
        elif action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "abort":
            os.abort()
        elif action == "hang":
            time.sleep(600)
        elif action == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif action == "noise":
            print("plain words from a library", flush=True)
            print("a warning from a library", file=sys.stderr, flush=True)
        elif action == "child":
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
                os._exit(0)
            (folder / "grandchild").write_text(str(pid))


logs.event(log, "phase", "importing", phase="import")
act("import")
logs.event(log, "phase", "loading", phase="load")
for done in (1, 2):
    logs.event(log, "progress", "loading", phase="load", done=done * 2**30, total=2 * 2**30, unit="bytes")
act("load")
logs.event(log, "phase", "warming up", phase="warmup")
act("warmup")
path = socket_path(config.uds_path, config.rank)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen(16)
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
logs.event(log, "phase", "ready", phase="ready")
act("ready")
over.wait()
os.unlink(path)
log.info("Exiting gracefully")
