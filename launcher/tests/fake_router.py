"""A router without HTTP, for tests of the launcher: waits for the shards' sockets, then says it serves.

FAKE_ROUTER: `hung:RANK` reports that rank when the test creates the file `go`, `exit3` ends before serving, `die`
after it, `deaf` ignores SIGTERM, `drain:S` takes S seconds to drain, `silent` never serves.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from tgi_proto import logs
from tgi_proto.argv import from_argv
from tgi_router.config import RouterConfig

config = from_argv(RouterConfig, sys.argv[1:], prog="fake_router")
log = logs.setup("tgi_router", config.log_level)
folder = Path(os.environ["FAKE_DIR"])
(folder / "router.pid").write_text(str(os.getpid()))
(folder / "router.argv").write_text("\n".join(sys.argv[1:]))
if config.api_key_file:
    (folder / "router.key").write_text(
        f"{Path(config.api_key_file).read_text()} {os.stat(config.api_key_file).st_mode & 0o777:o}"
    )
(folder / "router.environ").write_text("\n".join(f"{k}={v}" for k, v in sorted(os.environ.items())))
behaviour = os.environ.get("FAKE_ROUTER", "").split()
over = threading.Event()
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in behaviour else lambda *_: over.set())
if "exit3" in behaviour:
    log.error("the tokenizer cannot be read")
    sys.exit(3)
while not Path(config.master_shard_uds_path).is_socket():
    if over.wait(0.02):
        sys.exit(0)
if "silent" in behaviour:
    time.sleep(600)
log.info("Connected")
logs.event(log, "serving", "serving", address=f"http://{config.hostname}:{config.port}")
if "die" in behaviour:
    os.kill(os.getpid(), signal.SIGKILL)
for item in behaviour:
    if item.startswith("hung:"):
        while not (folder / "go").exists():
            time.sleep(0.01)
        logs.event(log, "shard_hung", "a shard does not answer", rank=int(item[5:]), deadline_s=config.step_deadline_s)
over.wait() if "deaf" not in behaviour else time.sleep(600)
log.info("signal received, starting graceful shutdown")
for item in behaviour:
    if item.startswith("drain:"):
        time.sleep(float(item[6:]))
log.info("drained")
