"""Start, stop and everything that can go wrong around them, as an operator sees it."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
from harness import MODEL_DIR, Json, Server, run_launcher, together, wait_until

PROMPT = "import os\n\n\nclass Reader:\n"
LONG: Json = {"max_new_tokens": 300, "do_sample": True, "temperature": 1.2, "details": True}
Launch = Callable[..., Server]


def fails(*flags: str, env: dict[str, str] | None = None, status: int) -> str:
    """What a launcher that must exit with `status` says about it: one error sentence, never a traceback."""
    result = run_launcher(*flags, env=env)
    said = result.stdout + result.stderr
    assert result.returncode == status, said
    assert "Traceback" not in said
    return said


# Start ----------------------------------------------------------------------------------------------------------------


def test_without_a_model_the_demo_model_is_served_and_the_log_says_so(server: Server) -> None:
    assert "demo" in server.log().lower()
    assert "Connected" in server.log()
    assert server.url in server.log()
    assert f"curl {server.url}/generate" in server.log()


def test_the_shards_and_the_router_are_ours_alone(server: Server) -> None:
    assert len(server.shards()) == 1
    assert server.router().is_alive()
    assert server.sockets() == ["s-0"]


def test_health_answers_only_when_a_request_can_be_served(launch: Launch) -> None:
    server = launch(wait=False)
    seen = []

    def ready() -> bool:
        seen.append(server.health())
        return seen[-1] == 200

    wait_until(ready, within_s=harness.START_S, what="ready")
    assert set(seen) <= {None, 503, 200}
    assert server.generate(PROMPT, max_new_tokens=1)
    server.stop()


def test_json_output_is_json_on_every_line_and_env_comes_before_serving(launch: Launch) -> None:
    server = launch("--json-output", "--env")
    server.generate(PROMPT, max_new_tokens=2)
    server.stop()
    lines = [json.loads(line) for line in server.log().splitlines()]
    assert len(lines) > 3
    for line in lines:
        assert line["timestamp"].endswith("Z")
        assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR")
        assert line["message"]
    assert any(line.get("rank") == 0 for line in lines)
    (environment,) = [line["message"] for line in lines if "Runtime environment" in line["message"]]
    assert "torch" in environment


def test_an_api_key_guards_every_route_but_health(launch: Launch) -> None:
    server = launch(
        "--api-key", "sésame-1", "--max-total-tokens", "300", env={"MAX_TOTAL_TOKENS": "200", "MAX_BEST_OF": "5"}
    )
    assert "sésame-1" not in server.log()
    assert not any("sésame-1" in p.command for p in server.processes() if p.pid != server.process.pid)
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}).encode()
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer S\u00c9SAME-1".encode().decode("latin-1")},
    ):
        for method, path in (
            ("POST", "/generate"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/metrics"),
            ("GET", "/info"),
        ):
            response = server.request(method, path, body if method == "POST" else None, header)
            assert response.status == 401, path
            assert response.json["error"]
    right = {"authorization": "Bearer sésame-1".encode().decode("latin-1")}
    assert server.request("POST", "/generate", body, right).status == 200
    info = server.request("GET", "/info", headers=right).json  # the command line beats the environment
    assert (info["max_total_tokens"], info["max_best_of"]) == (300, 5)
    assert [server.get(path).status for path in ("/health", "/ping", "/")] == [200, 200, 200]
    server.stop()


def test_no_connection_leaves_the_machine(launch: Launch, tmp_path: Path) -> None:
    """Nothing that serves a local model connects to anything but this machine."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace))
    server = launch("--model-id", str(MODEL_DIR), prefix=prefix)
    server.generate(PROMPT, max_new_tokens=2)
    for process in server.processes():
        if "text-generation-launcher" in process.command and not process.command.startswith("strace"):
            process.signal(signal.SIGTERM)
            break
    server.wait_exit(60)
    addresses = set(re.findall(r'(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"', trace.read_text()))
    assert all(address.startswith("127.") or address == "::1" for address in addresses), addresses


@pytest.mark.skipif(os.system("unshare -rn true 2>/dev/null") != 0, reason="network namespaces are not permitted here")
def test_it_serves_without_any_network(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import harness
server = harness.start()
try:
    assert server.generate("import os", max_new_tokens=2)["generated_text"]
    server.stop()
finally:
    server.destroy()
"""
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-c", script]
    assert os.spawnvpe(os.P_WAIT, "unshare", command, harness.environment()) == 0


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "env", "quoted"),
    [
        (["--no-such-flag"], {}, "--no-such-flag"),
        (["--num-shard", "two"], {}, "--num-shard"),
        (["--port", "70000"], {}, "--port"),
        ([], {"NUM_SHARD": ""}, "--num-shard"),
        ([], {"TRUST_REMOTE_CODE": "1"}, "--trust-remote-code"),
        (["--dtype", "FLOAT16"], {}, "--dtype"),
    ],
)
def test_what_cannot_be_parsed_exits_2_and_names_the_flag(flags: list[str], env: dict[str, str], quoted: str) -> None:
    assert quoted in fails(*flags, env=env, status=2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--max-input-tokens", "10", "--max-total-tokens", "10"],
            "`max_input_tokens`(10) must be < `max_total_tokens`(10)",
        ),
        (
            ["--max-input-tokens", "1", "--max-input-length", "2"],
            "Both `max_input_tokens` (1) and `max_input_length` (2)",
        ),
        (["--validation-workers", "0"], "`validation_workers` must be > 0"),
        (["--num-shard", "0"], "`num_shard` cannot be < 1"),
        (["--num-shard", "7"], "heads"),
        (["--quantize", "gptq"], "`quantize` is 'gptq', but quantization is not built yet"),
        (["--lora-adapters", "a"], "`lora_adapters`"),
        (["--ngrok"], "`ngrok`"),
    ],
)
def test_what_cannot_be_served_exits_1_with_one_sentence(flags: list[str], sentence: str) -> None:
    assert sentence in fails(*flags, status=1)


def test_an_unknown_directory_exits_1_and_names_it() -> None:
    said = fails("--model-id", "./no/such/model", status=1)
    assert "./no/such/model" in said


def test_a_hub_model_that_is_not_cached_says_so_when_offline(tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = fails("--model-id", "nobody/no-model", env=env, status=1)
    assert "nobody/no-model" in said
    assert "HF_HUB_OFFLINE" in said


def test_a_broken_weight_file_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    uds_path = str(tmp_path / "s")
    said = fails("--model-id", str(model), "--port", str(harness.free_port()), "--shard-uds-path", uds_path, status=1)
    assert "model.safetensors" in said


def test_a_port_in_use_is_named_and_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = fails("--hostname", "127.0.0.1", "--port", port, "--shard-uds-path", str(tmp_path / "s"), status=1)
    assert port in said
    assert "in use" in said
    assert harness.processes_with(str(tmp_path / "s")) == []


def test_version_and_help_answer_at_once() -> None:
    assert re.fullmatch(r"text-generation-launcher \d+\.\d+\.\d+\S*\n", run_launcher("--version").stdout)
    assert "--model-id" in run_launcher("--help").stdout


# Stop -----------------------------------------------------------------------------------------------------------------


def test_sigterm_drains(launch: Launch) -> None:
    """Readiness goes at once, nothing new is taken, what runs and what waits is finished, and the exit status is 0."""
    server = launch("--max-batch-size", "2")
    seeds = range(4)  # two run, two wait
    expected = together(lambda seed: server.generate_stream(PROMPT, **LONG, seed=seed)[-1], seeds)
    streams = [server.stream("/generate_stream", {"inputs": PROMPT, "parameters": {**LONG, "seed": s}}) for s in seeds]
    wait_until(lambda: server.metric("tgi_batch_current_size") == 2, within_s=30, what="two requests run")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health() == 503, within_s=20, what="/health says 503")
    response = server.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}})
    assert response.status == 503
    assert "shutting down" in response.json["error"]
    ends = together(lambda stream: list(stream.events())[-1], streams)
    assert [e["generated_text"] for e in ends] == [e["generated_text"] for e in expected]
    assert server.wait_exit(15) == 0
    assert server.leftovers() == []


def test_a_second_signal_exits_at_once(launch: Launch) -> None:
    server = launch()
    with server.stream(
        "/generate_stream", {"inputs": PROMPT, "parameters": {**LONG, "max_new_tokens": 1500}}
    ) as stream:
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.health() == 503, within_s=20, what="it drains")
        server.process.send_signal(signal.SIGTERM)
        server.wait_exit(5)
    assert server.leftovers() == []


def test_ctrl_c_ends_it_cleanly(launch: Launch) -> None:
    """A terminal sends SIGINT to the whole foreground process group."""
    server = launch()
    with server.stream("/generate_stream", {"inputs": PROMPT, "parameters": {**LONG, "seed": 1}}) as stream:
        events = stream.events()
        next(events)
        os.killpg(server.process.pid, signal.SIGINT)
        last = list(events)[-1]
    assert last["generated_text"] is not None
    assert server.wait_exit(15) == 0
    assert server.leftovers() == []
    assert "Traceback" not in server.log()


def test_running_requests_are_cut_when_the_grace_period_is_over(launch: Launch) -> None:
    server = launch("--graceful-termination-timeout", "1")
    parameters = {**LONG, "max_new_tokens": 1900, "temperature": 5.0}
    with server.stream("/generate_stream", {"inputs": PROMPT, "parameters": parameters}) as stream:
        events = stream.events()
        next(events)
        server.process.send_signal(signal.SIGTERM)
        last = list(events)[-1]
    assert last.get("error_type") == "incomplete_generation_stream" or last["generated_text"] is not None
    server.wait_exit(15)
    assert server.leftovers() == []


@pytest.mark.parametrize("when", ["serving", "starting"])
def test_killing_the_launcher_leaves_no_process_and_the_next_start_is_clean(launch: Launch, when: str) -> None:
    server = launch(wait=when == "serving")
    if when == "starting":
        wait_until(server.shards, within_s=30, what="the shard is spawned")
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not server.processes(), within_s=20, what="shards and router are gone")
    again = launch("--shard-uds-path", server.uds_path, port=server.port)
    assert again.generate(PROMPT, max_new_tokens=1)
    again.process.send_signal(signal.SIGTERM)
    assert again.wait_exit(30) == 0
    assert server.leftovers() == []


def test_a_dead_router_ends_the_launcher_with_its_cause(launch: Launch) -> None:
    server = launch()
    server.router().signal(signal.SIGKILL)
    assert server.wait_exit(15) == 1
    assert re.search(r"(?i)router.*(SIGKILL|signal 9)", server.log())
    assert server.leftovers() == []


def test_a_signal_during_start_ends_it(launch: Launch) -> None:
    server = launch(wait=False)
    wait_until(server.shards, within_s=30, what="the shard is spawned")
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit(15) == 0
    assert server.leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("round_number", range(20))
def test_draining_loses_nothing(launch: Launch, round_number: int) -> None:
    server = launch("--max-batch-size", "8")
    answers: list[Json] = []

    def client(seed: int) -> None:
        answers.append(server.generate(PROMPT, **LONG, seed=seed))

    clients = [threading.Thread(target=client, args=(100 * round_number + i,)) for i in range(16)]
    for thread in clients:
        thread.start()
    wait_until(lambda: server.metric("tgi_request_count") >= 16, within_s=30, what="all requests are in")
    server.process.send_signal(signal.SIGTERM)
    for thread in clients:
        thread.join()
    assert len(answers) == 16
    assert server.wait_exit(15) == 0
    assert server.leftovers() == []
