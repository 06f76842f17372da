"""Every fenced block of README.md is run. The convention:

* ```sh      is run in a shell and must print something. `make ...` is special: `make serve` is started, must print
             its address and a curl line and end with Ctrl-C; `make test` runs this test: only its target is checked.
* ```python  is run as a program and must print something.
* ```        (no language) holds launcher command lines that need a model or GPUs from elsewhere. Each is run with the
             embedded model in place of its own, a free port, and at most two shards, and must serve.

Blocks that talk to port 3000 talk to the test's server instead. A block of any other language fails the test.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import harness
import pytest
from harness import MODEL_DIR, ROOT, Server, wait_until

README = (ROOT / "README.md").read_text()


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block, comments and continuations removed."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+#.*$", "", line).strip()
        if command and not command.startswith("#"):
            yield command


def of_language(language: str) -> list[str]:
    return [text for name, text in blocks() if name == language]


SHELL = [c for text in of_language("sh") for c in commands(text)]
LAUNCHES = [c for text in of_language("") for c in commands(text)]


def pointed_at(server: Server, text: str) -> str:
    return text.replace("http://localhost:3000", server.url).replace("localhost:3000", f"127.0.0.1:{server.port}")


def test_every_block_has_a_known_language() -> None:
    assert {language for language, _ in blocks()} <= {"sh", "python", ""}
    assert SHELL
    assert of_language("python")


@pytest.mark.parametrize("command", [c for c in SHELL if not c.startswith("make ")])
def test_a_shell_command_works(server: Server, command: str) -> None:
    run = [
        "bash",
        "-eo",
        "pipefail",
        "-c",
        pointed_at(server, command).replace("curl ", "curl --fail-with-body -sS ", 1),
    ]
    result = subprocess.run(
        run, cwd=ROOT, env=harness.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout


@pytest.mark.parametrize("program", of_language("python"))
def test_a_python_program_works(server: Server, program: str) -> None:
    run = [sys.executable, "-c", pointed_at(server, program)]
    result = subprocess.run(
        run, cwd=ROOT, env=harness.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("command", LAUNCHES)
def test_a_launcher_command_works_on_the_embedded_model(launch: Callable[..., Server], command: str) -> None:
    words = shlex.split(command)
    env = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = str(MODEL_DIR) if name == "MODEL_ID" else value
    assert words.pop(0) == "text-generation-launcher", command
    replaced: dict[str, str | None] = {"--model-id": str(MODEL_DIR), "--num-shard": "2", "--port": None}
    flags: list[str] = []
    while words:
        flag = words.pop(0)
        if flag not in replaced:
            flags.append(flag)
            continue
        words.pop(0)
        if new := replaced[flag]:
            flags += [flag, new]
    server = launch(*flags, env=env)
    assert server.generate("import os", max_new_tokens=2)
    server.stop()


@pytest.mark.parametrize("command", [c for c in SHELL if c.startswith("make ")])
def test_a_make_target_exists(command: str) -> None:
    subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


def test_make_serve_starts_shows_what_to_try_and_ends_with_ctrl_c() -> None:
    """As a user would; only the port and the socket path are free ones, given through the environment."""
    if "make serve" not in SHELL:
        pytest.skip("README.md has no `make serve`")
    port = harness.free_port()
    env = harness.environment(
        PORT=str(port), SHARD_UDS_PATH=f"/tmp/tgi-make-{port}", MASTER_PORT=str(harness.free_port())
    )
    process = subprocess.Popen(
        ["make", "serve"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if "curl" in line:
                break
        assert any(str(port) in line and "curl" in line for line in said), "".join(said)
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
        process.wait(30)
        wait_until(lambda: not harness.processes_with(f"/tmp/tgi-make-{port}"), within_s=20, what="nothing is left")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
