"""--grpc-port, --grpc-tls-cert and --grpc-tls-key: what is refused, and what reaches the router."""

import socket
from pathlib import Path
from typing import Any

import pytest
from tgi_launcher import preflight
from tgi_launcher.checks import check_flags
from tgi_launcher.child_configs import Ambient, ModelSource
from tgi_launcher.errors import ArgumentValidation
from tgi_launcher.facts import Weights, parse_config
from tgi_launcher.flags import Flags
from tgi_launcher.memory_fit import GIB
from tgi_launcher.plan import make_plan
from tgi_launcher.resources import Machine, Memory, free_port
from tgi_proto.argv import from_argv, to_argv
from tgi_router.config import RouterConfig


def flags(**values: Any) -> Flags:
    return Flags(**values, sources=dict.fromkeys(values, "flag"))


def router(**values: Any) -> RouterConfig:
    facts = parse_config(
        {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 8, "vocab_size": 256, "max_position_embeddings": 2048},
        Weights(1_000_000, 2_000_000, "bfloat16"),
    )  # fmt: skip
    machine = Machine(Memory(int(16 * GIB), int(8 * GIB), "machine"), 4)
    return make_plan(flags(**values), ModelSource("/models/tiny", "tiny", "test"), facts, machine, Ambient()).router


def test_there_is_no_grpc_port_unless_it_is_given() -> None:
    assert router().grpc_port == 0
    assert "--grpc-port" not in to_argv(router())


def test_port_and_tls_files_reach_the_router() -> None:
    config = router(grpc_port=50051, grpc_tls_cert="c.pem", grpc_tls_key="k.pem")
    assert (config.grpc_port, config.grpc_tls_cert, config.grpc_tls_key) == (50051, "c.pem", "k.pem")
    assert from_argv(RouterConfig, to_argv(config), prog="router") == config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"grpc_port": 0}, "`grpc_port` must be > 0"),
        ({"grpc_port": 3000}, "`grpc_port` and `port` are both 3000: choose another with --grpc-port"),
        (
            {"grpc_port": 9, "prometheus_port": 9},
            "`grpc_port` and `prometheus_port` are both 9: choose another with --grpc-port",
        ),
        (
            {"grpc_port": 9, "grpc_tls_cert": "c"},
            "`grpc_tls_cert` needs `grpc_tls_key`: give --grpc-tls-key too",
        ),
        ({"grpc_port": 9, "grpc_tls_key": "k"}, "`grpc_tls_key` needs `grpc_tls_cert`: give --grpc-tls-cert too"),
        (
            {"grpc_tls_cert": "c", "grpc_tls_key": "k"},
            "`grpc_tls_cert` needs `grpc_port`: give --grpc-port too",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused_with_the_flag_to_change(
    values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ArgumentValidation) as info:
        check_flags(flags(**values), {})
    assert info.value.sentence == sentence


def test_the_default_port_of_metrics_which_is_not_listened_on_is_free_for_grpc() -> None:
    assert check_flags(flags(grpc_port=9000), {}) == []


def test_a_taken_port_and_a_missing_file_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentValidation) as info:
            preflight.check_ports(flags(hostname="127.0.0.1", port=free_port(), grpc_port=port))
        assert f"`grpc_port` {port} cannot be listened on at 127.0.0.1: Address already in use" in info.value.sentence
        assert "--grpc-port" in info.value.sentence
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.touch()
    given = flags(grpc_port=9, grpc_tls_cert=str(cert), grpc_tls_key=str(key))
    with pytest.raises(ArgumentValidation) as info:
        preflight.check_files(given)
    assert info.value.sentence == f"`grpc_tls_key` is '{key}', but there is no such file"
    key.touch()
    preflight.check_files(given)
