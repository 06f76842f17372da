"""Every row of TGI's table of launcher flags: name, variable, type, default, precedence, and clap's visible rules."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tgi_launcher import cli
from tgi_launcher.flags import Flags, Kind, specs

# flag, its TGI default, a text that parses, the value it parses to. Variables are the names in capitals.
ROWS: list[tuple[str, Any, str, Any]] = [
    ("revision", None, "refs/pr/2", "refs/pr/2"),
    ("validation-workers", 2, "3", 3),
    ("sharded", None, "true", True),
    ("num-shard", None, "2", 2),
    ("quantize", None, "bitsandbytes-nf4", "bitsandbytes-nf4"),
    ("speculate", None, "0", 0),
    ("dtype", None, "bfloat16", "bfloat16"),
    ("kv-cache-dtype", None, "fp8_e5m2", "fp8_e5m2"),
    ("trust-remote-code", False, "true", True),
    ("max-concurrent-requests", 128, "7", 7),
    ("max-best-of", 2, "7", 7),
    ("max-stop-sequences", 4, "7", 7),
    ("max-top-n-tokens", 5, "7", 7),
    ("max-input-tokens", None, "7", 7),
    ("max-input-length", None, "7", 7),
    ("max-total-tokens", None, "7", 7),
    ("waiting-served-ratio", 0.3, "1.2", 1.2),
    ("max-batch-prefill-tokens", None, "7", 7),
    ("max-batch-total-tokens", None, "7", 7),
    ("max-waiting-tokens", 20, "7", 7),
    ("max-batch-size", None, "7", 7),
    ("cuda-graphs", None, "1,2,4", (1, 2, 4)),
    ("hostname", "0.0.0.0", "127.0.0.1", "127.0.0.1"),
    ("port", 3000, "80", 80),
    ("prometheus-port", 9000, "9100", 9100),
    ("shard-uds-path", "/tmp/text-generation-server", "/tmp/x", "/tmp/x"),
    ("master-addr", "localhost", "10.0.0.1", "10.0.0.1"),
    ("master-port", 29500, "29501", 29501),
    ("huggingface-hub-cache", None, "/data", "/data"),
    ("weights-cache-override", None, "/w", "/w"),
    ("disable-custom-kernels", False, "true", True),
    ("cuda-memory-fraction", 1.0, "0.5", 0.5),
    ("rope-scaling", None, "dynamic", "dynamic"),
    ("rope-factor", None, "2.5", 2.5),
    ("json-output", False, "true", True),
    ("otlp-endpoint", None, "http://c:4317", "http://c:4317"),
    ("otlp-service-name", "text-generation-inference.router", "n", "n"),
    ("cors-allow-origin", (), "https://a", ("https://a",)),
    ("api-key", None, "k", "k"),
    ("watermark-gamma", None, "0.25", 0.25),
    ("watermark-delta", None, "-1.5", -1.5),
    ("ngrok", False, "true", True),
    ("ngrok-authtoken", None, "t", "t"),
    ("ngrok-edge", None, "e", "e"),
    ("tokenizer-config-path", None, "/t.json", "/t.json"),
    ("disable-grammar-support", False, "true", True),
    ("max-client-batch-size", 4, "7", 7),
    ("lora-adapters", None, "a,b=/c", "a,b=/c"),
    ("usage-stats", "on", "no-stack", "no-stack"),
    ("payload-limit", 2_000_000, "7", 7),
    ("enable-prefill-logprobs", False, "true", True),
    ("graceful-termination-timeout", 90, "7", 7),
    ("aip-predict-route", None, "/p", "/p"),  # TGI reads Vertex AI's variables alone
    ("aip-health-route", None, "/h", "/h"),
    ("aip-http-port", None, "7", 7),
    ("model-id", None, "gpt2", "gpt2"),  # TGI's default is bloom-560m; ours is the embedded demo model
]
OURS = (
    *(
        "num-threads",
        "step-deadline",
        "stall-timeout",
        "restart-budget",
        "strict-params",
        "open-path",
        "grpc-port",
        "grpc-tls-cert",
        "grpc-tls-key",
    ),
    *("tool-call-parser", "reasoning-parser"),
)


def parse(*argv: str, **environ: str) -> Flags:
    """What the command would run with. The environment holds nothing else."""
    seen: list[Flags] = []

    def run(flags: Flags, _: Any) -> int:
        seen.append(flags)
        return 0

    result = CliRunner().invoke(cli.command(run), argv, env={**dict.fromkeys(os.environ), **environ})
    assert result.exit_code == 0, result.output
    return seen[0]


def refusal(*argv: str, **environ: str) -> str:
    """What is printed to stderr when parsing fails, with status 2."""
    result = CliRunner().invoke(cli.command(lambda *_: 0), argv, env={**dict.fromkeys(os.environ), **environ})
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def field(flag: str) -> str:
    return flag.replace("-", "_")


def is_switch(flag: str) -> bool:
    return specs()[field(flag)][0].kind is Kind.SWITCH


@pytest.mark.parametrize(("flag", "default", "text", "value"), ROWS, ids=[row[0] for row in ROWS])
def test_a_flag_has_tgis_default_and_type_and_beats_its_variable(
    flag: str, default: Any, text: str, value: Any
) -> None:
    name = field(flag)
    assert getattr(parse(), name) == default
    argv = [f"--{flag}"] if is_switch(flag) else [f"--{flag}", text]
    assert getattr(parse(*argv), name) == value
    assert parse(*argv).reason(name) == f"flag --{flag}"
    from_environment = parse(**{name.upper(): text})
    assert getattr(from_environment, name) == value
    assert type(getattr(from_environment, name)) is type(value)
    assert from_environment.reason(name) == f"environment {name.upper()}"
    other = {"true": "false"}.get(text, text)
    assert getattr(parse(*argv, **{name.upper(): other}), name) == value


def test_the_table_names_every_flag_there_is() -> None:
    assert {*(row[0] for row in ROWS), *OURS, "env", "plan"} == {name.replace("_", "-") for name in specs()}


def test_our_own_flags_have_their_documented_defaults() -> None:
    flags = parse()
    assert (flags.step_deadline, flags.stall_timeout, flags.restart_budget, flags.num_threads) == (60, 300, 3, None)


def test_p_means_port_and_g_the_grace_period_and_e_the_environment() -> None:
    flags = parse("-p", "80", "-g", "5", "-e")
    assert (flags.port, flags.prometheus_port, flags.graceful_termination_timeout, flags.env) == (80, 9000, 5, True)


def test_env_and_plan_have_no_variable() -> None:
    assert parse(ENV="true", PLAN="true") == parse()


@pytest.mark.parametrize("flag", [row[0] for row in ROWS if is_switch(row[0])])
def test_a_boolean_variable_is_exactly_true_or_false(flag: str) -> None:
    name = field(flag).upper()
    assert getattr(parse(**{name: "false"}), field(flag)) is False
    for text in ("1", "True", "yes", ""):
        assert f"invalid value '{text}' for '--{flag}': [possible values: true, false]" in refusal(**{name: text})


def test_sharded_takes_a_value() -> None:
    assert parse("--sharded", "false").sharded is False
    assert "possible values: true, false" in refusal("--sharded", "1")


@pytest.mark.parametrize("flag", ["num-shard", "port", "cuda-memory-fraction", "cuda-graphs", "rope-factor"])
def test_an_empty_variable_counts_as_set(flag: str) -> None:
    assert f"invalid value '' for '--{flag}'" in refusal(**{field(flag).upper(): ""})


def test_an_empty_text_variable_is_an_empty_text() -> None:
    assert parse(LORA_ADAPTERS="").lora_adapters == ""


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("quantize", "GPTQ"),
        ("dtype", "Float16"),
        ("kv-cache-dtype", "fp8"),
        ("rope-scaling", "Linear"),
        ("usage-stats", "ON"),
        ("num-shard", "-1"),
        ("num-shard", "two"),
        ("num-shard", "1_0"),
        ("num-shard", "1.0"),
        ("num-shard", str(2**64)),
        ("port", "65536"),
        ("max-top-n-tokens", str(2**32)),
        ("rope-factor", "big"),
        ("graceful-termination-timeout", "1.5"),
    ],
)
def test_what_cannot_be_parsed_is_named_on_stderr_with_status_2(flag: str, text: str) -> None:
    assert f"invalid value '{text}' for '--{flag}'" in refusal(f"--{flag}", text)
    assert f"invalid value '{text}' for '--{flag}'" in refusal(**{field(flag).upper(): text})


def test_numbers_are_spelled_as_rust_spells_them() -> None:
    assert parse("--num-shard", "+2").num_shard == 2
    assert parse("--rope-factor", "2").rope_factor == 2.0
    assert parse("--rope-factor", ".5e1").rope_factor == 5.0


def test_a_repeatable_flag_collects_and_its_variable_is_one_value() -> None:
    assert parse("--cors-allow-origin", "a", "--cors-allow-origin", "b").cors_allow_origin == ("a", "b")
    assert parse(CORS_ALLOW_ORIGIN="a,b").cors_allow_origin == ("a,b",)


def test_there_are_no_positional_arguments_and_no_abbreviations() -> None:
    assert "gpt2" in refusal("gpt2")
    assert "--max-best" in refusal("--max-best", "1")


def test_help_lists_every_flag_with_its_variable_and_says_that_nothing_is_sent() -> None:
    text = CliRunner().invoke(cli.command(lambda *_: 0), ["--help"]).stdout
    for name, (spec, _) in specs().items():
        assert cli.option_name(name) in text
        assert not spec.has_env or name.upper() in text
    assert "nothing is ever sent" in " ".join(text.split())


def test_the_version_line() -> None:
    assert CliRunner().invoke(cli.command(lambda *_: 0), ["-V"]).stdout == f"text-generation-launcher {cli.version()}\n"


def test_secrets_do_not_show_when_flags_are_printed() -> None:
    assert "geheim" not in repr(parse("--api-key", "geheim", "--ngrok-authtoken", "geheim"))


def launcher(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tgi_launcher.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def test_as_a_program_a_parse_error_is_status_2_and_a_wrong_flag_status_1() -> None:
    wrong = launcher("--port", "x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "invalid value 'x'" in wrong.stderr
    refused = launcher("--quantize", "gptq")
    assert refused.returncode == 1
    assert refused.stderr.startswith('Error: ArgumentValidation("`quantize` is')


def test_importing_and_parsing_cost_no_heavy_module() -> None:
    code = (
        "import sys; from tgi_launcher import cli, launch; "
        "heavy = {'torch', 'transformers', 'aiohttp', 'huggingface_hub', 'grpc', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_signal_before_anything_was_started_is_status_0(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    code = (
        "import sys, time, pathlib; from tgi_launcher import cli, launch\n"
        f"launch.run = lambda *a, **k: (pathlib.Path({str(marker)!r}).touch(), time.sleep(60))\n"
        "cli.main([])"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_the_wrong_part_of_a_list_is_named() -> None:
    assert "invalid value 'x' for '--cuda-graphs'" in refusal("--cuda-graphs", "1,x")
