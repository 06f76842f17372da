"""The planner on made-up machines: TGI's rules and sentences, limits that fit memory, and a reason for every value."""

import dataclasses
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tgi_launcher.checks import check_flags, resolve_hostname
from tgi_launcher.child_configs import Ambient, ModelSource
from tgi_launcher.errors import ArgumentValidation
from tgi_launcher.facts import ModelFacts, Weights, parse_config
from tgi_launcher.flags import Flags
from tgi_launcher.gpu import Gpu
from tgi_launcher.limits import CPU_STEP_TOKENS, MAX_DEFAULT_ROWS
from tgi_launcher.memory_fit import GIB, estimate
from tgi_launcher.plan import LaunchPlan, check_shardable, make_plan, num_shards
from tgi_launcher.resources import Machine, Memory

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def make_facts(parameters: int = 1_000_000, **config: Any) -> ModelFacts:
    return parse_config({**LLAMA, **config}, Weights(parameters, parameters * 2, "bfloat16"))


def make_flags(**values: Any) -> Flags:
    return Flags(**values, sources=dict.fromkeys(values, "flag"))


def cpu(free_gib: float = 8.0, cores: int = 4, **values: Any) -> Machine:
    return Machine(Memory(int(16 * GIB), int(free_gib * GIB), "machine"), cores, **values)


def cuda(*free_gib: float) -> Machine:
    gpus = tuple(Gpu(i, f"GPU-{i}", "NVIDIA H200", int(141 * GIB), int(free * GIB)) for i, free in enumerate(free_gib))
    return cpu(gpus=gpus, device_count=None)


def plan(machine: Machine | None = None, facts: ModelFacts | None = None, **values: Any) -> LaunchPlan:
    source = ModelSource("/models/tiny", "tiny", "flag --model-id")
    return make_plan(make_flags(**values), source, facts or make_facts(), machine or cpu(), Ambient())


def row(plan: LaunchPlan, name: str) -> tuple[str, str]:
    (found,) = [(row.value, row.reason) for row in plan.resolved if row.name == name]
    return found


def error(call: Any, *args: Any, **values: Any) -> str:
    with pytest.raises(ArgumentValidation) as info:
        call(*args, **values)
    return info.value.sentence


# -- TGI's rules for the number of shards


@pytest.mark.parametrize(
    ("sharded", "num_shard", "devices", "expected"),
    [
        (True, None, 4, 4),
        (True, 2, 4, 2),
        (True, 2, None, 2),
        (False, 3, 4, 3),
        (False, None, 4, 1),
        (None, None, 4, 4),
        (None, None, None, 1),
        (None, 2, None, 2),
    ],
)
def test_the_number_of_shards_follows_tgis_table(
    sharded: bool | None, num_shard: int | None, devices: int | None, expected: int
) -> None:
    assert num_shards(Flags(sharded=sharded, num_shard=num_shard), devices).value == expected


@pytest.mark.parametrize(
    ("sharded", "num_shard", "devices", "sentence"),
    [
        (True, None, 1, "not enough cuda devices: `sharded` is true but only found 1 CUDA devices"),
        (True, 1, 4, "Invalid argument: `sharded` is true but `num_shard` <= 1"),
        (None, 0, 4, "Invalid argument: `num_shard` cannot be < 1"),
    ],
)
def test_wrong_numbers_of_shards_get_tgis_sentences(
    sharded: bool | None, num_shard: int | None, devices: int, sentence: str
) -> None:
    assert error(num_shards, Flags(sharded=sharded, num_shard=num_shard), devices) == sentence


def test_sharded_without_a_known_number_of_devices_says_what_to_give() -> None:
    assert "--num-shard" in error(num_shards, Flags(sharded=True), None)


@pytest.mark.parametrize(("kv_heads", "shards"), [(2, 1), (2, 2), (2, 4), (2, 8), (8, 4), (1, 8)])
def test_shards_that_divide_the_heads_are_accepted(kv_heads: int, shards: int) -> None:
    check_shardable(make_facts(num_key_value_heads=kv_heads), shards)


def test_shards_that_do_not_divide_the_heads_are_refused() -> None:
    assert "must divide the model's 8 attention heads" in error(check_shardable, make_facts(), 3)
    facts = make_facts(num_attention_heads=12, num_key_value_heads=6)
    assert "6 key/value heads" in error(check_shardable, facts, 4)


def test_more_shards_than_gpus_are_refused() -> None:
    assert "only 2 CUDA devices are visible" in error(plan, cuda(100, 100), num_shard=4)


# -- TGI's sentences about flags


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"max_input_tokens": 5, "max_input_length": 6},
            "Both `max_input_tokens` (5) and `max_input_length` (6) are set. Please define only `max_input_tokens` as "
            "`max_input_length is deprecated for naming consistency.",
        ),
        ({"max_input_tokens": 9, "max_total_tokens": 9}, "`max_input_tokens`(9) must be < `max_total_tokens`(9)"),
        ({"max_input_length": 9, "max_total_tokens": 8}, "`max_input_tokens`(9) must be < `max_total_tokens`(8)"),
        ({"validation_workers": 0}, "`validation_workers` must be > 0"),
        (
            {"max_total_tokens": 9, "max_batch_total_tokens": 8},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        (
            {"max_batch_prefill_tokens": 9, "max_batch_total_tokens": 8},
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        ({"max_batch_size": 0}, "`max_batch_size` must be > 0"),
        ({"num_threads": 100_000}, "`num_threads` must be <= 4096. Given: 100000"),
        ({"open_path": ("/info", "metrics")}, "`open_path` must be a path that begins with '/'. Given: 'metrics'"),
    ],
)
def test_contradicting_flags_get_tgis_sentences(values: dict[str, Any], sentence: str) -> None:
    assert error(check_flags, make_flags(**values), {}) == sentence


@pytest.mark.parametrize(
    "values",
    [
        {"quantize": "gptq"},
        {"speculate": 2},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"lora_adapters": "a"},
        {"ngrok": True},
    ],
)
def test_what_is_not_built_is_refused_in_one_sentence_that_names_it(values: dict[str, Any]) -> None:
    (name,) = values
    sentence = error(check_flags, make_flags(**values), {})
    assert sentence.startswith(f"`{name}` is ")
    assert "not built" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "values",
    [{"speculate": 0}, {"lora_adapters": ""}, {"usage_stats": "on"}, {"enable_prefill_logprobs": True}, {}],
)
def test_harmless_values_are_accepted_without_a_word(values: dict[str, Any]) -> None:
    assert check_flags(make_flags(**values), {}) == []


@pytest.mark.parametrize(
    "name", ["waiting_served_ratio", "max_waiting_tokens", "cuda_graphs", "disable_custom_kernels"]
)
def test_performance_hints_are_accepted_with_a_sentence(name: str) -> None:
    (notice,) = check_flags(Flags(sources={name: "env"}), {})
    assert notice.startswith(f"`{name}` has no effect")


def test_variables_of_tgis_other_processes_get_a_sentence() -> None:
    notices = check_flags(Flags(), {"ATTENTION": "paged", "PREFIX_CACHING": "0", "HOME": "/root"})
    assert [notice.split("`")[1] for notice in notices] == ["ATTENTION", "PREFIX_CACHING"]
    assert check_flags(Flags(), {"HF_MODEL_ID": "a/b"}) == ["`HF_MODEL_ID` has no effect: set MODEL_ID"]


def test_remote_code_is_warned_about() -> None:
    (notice,) = check_flags(make_flags(trust_remote_code=True, model_id="a/b"), {})
    assert "a/b" in notice


@pytest.mark.parametrize(
    "values",
    [
        {"model_id": ""},
        {"api_key": ""},
        {"cuda_memory_fraction": 0.0},
        {"cuda_memory_fraction": 1.1},
        {"watermark_gamma": 1.0},
        {"rope_factor": 0.0},
        {"max_concurrent_requests": 0},
        {"step_deadline": 0.0},
        {"stall_timeout": 0.0},
        {"num_threads": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    (name,) = values
    assert f"`{name}`" in error(check_flags, make_flags(**values), {})


@pytest.mark.parametrize(
    ("text", "ip", "warns"),
    [
        ("0.0.0.0", "0.0.0.0", False),
        ("::1", "::1", False),
        ("localhost", "127.0.0.1", False),
        ("f3a9c1", "0.0.0.0", True),
    ],
)
def test_a_hostname_that_is_no_ip_address_becomes_0_0_0_0_with_a_warning(text: str, ip: str, warns: bool) -> None:
    address, _, warning = resolve_hostname(Flags(hostname=text, sources={"hostname": "env"}))
    assert address == ip
    assert (warning is not None) == warns
    assert plan(hostname=text).router.hostname == ip
    assert any("Invalid hostname" in warning for warning in plan(hostname=text).warnings) == warns


# -- limits


def test_on_a_cpu_the_step_budget_is_small_and_says_why() -> None:
    made = plan()
    assert made.shards[0].max_step_tokens == CPU_STEP_TOKENS == made.router.max_batch_prefill_tokens
    assert "streams do not stall" in row(made, "max_batch_prefill_tokens")[1]


def test_on_a_gpu_the_step_budget_is_tgis() -> None:
    assert plan(cuda(100)).shards[0].max_step_tokens == 2048  # min(4096, max_position_embeddings)
    assert plan(cuda(100), make_facts(max_position_embeddings=32768)).shards[0].max_step_tokens == 4096


def test_a_short_model_limits_the_step_budget() -> None:
    made = plan(facts=make_facts(max_position_embeddings=128))
    assert row(made, "max_batch_prefill_tokens") == ("128", "model max_position_embeddings")


def test_the_step_budget_is_reduced_until_it_fits_and_the_table_says_so() -> None:
    facts = make_facts(parameters=1, hidden_size=4096, intermediate_size=16384, max_position_embeddings=32768)
    free = estimate(facts, "float32", 1, "cpu", 128).fixed / GIB + 0.3
    made = plan(cpu(free), facts, max_batch_prefill_tokens=4096)
    assert 64 <= made.shards[0].max_step_tokens < 4096
    assert "4096" in row(made, "max_batch_prefill_tokens")[1]
    assert "`max_batch_prefill_tokens` was reduced from 4096" in made.warnings[0]


def test_a_model_whose_weights_do_not_fit_is_refused_with_numbers_and_a_way_out() -> None:
    sentence = error(plan, cpu(6), make_facts(parameters=7_000_000_000))
    assert "7.00 billion parameters in float32" in sentence
    assert "6.0 GiB are free" in sentence
    assert "--dtype bfloat16" in sentence
    assert "--num-shard" in error(plan, cuda(6), make_facts(parameters=7_000_000_000))


def test_a_context_whose_kv_does_not_fit_is_refused_with_the_number_that_would() -> None:
    facts = make_facts(num_hidden_layers=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072)
    sentence = error(plan, cpu(2), facts, max_total_tokens=100_000)
    assert "there is memory for only" in sentence
    assert "--max-total-tokens" in sentence


def test_the_cgroup_is_named_when_it_is_what_limits() -> None:
    machine = Machine(Memory(int(4 * GIB), int(3 * GIB), "cgroup"), 2)
    assert "3.0 GiB of 4.0 GiB free in the cgroup" in row(plan(machine), "device")[1]


def test_ranks_on_a_cpu_share_its_memory_and_on_gpus_do_not() -> None:
    facts = make_facts(parameters=1_000_000_000)
    assert error(plan, cpu(4), facts, num_shard=2)
    assert len(plan(cuda(4, 4), facts, num_shard=2).shards) == 2


def test_the_kv_pool_on_a_cpu_holds_every_request_or_half_of_the_memory() -> None:
    assert plan().shards[0].max_kv_tokens == 128 * 2048
    assert row(plan(), "max_batch_total_tokens")[1] == "every request at full length"
    big = plan(facts=make_facts(num_hidden_layers=32, num_key_value_heads=8, head_dim=128))
    assert row(big, "max_batch_total_tokens")[1] == "half of the free memory"
    assert big.shards[0].max_kv_tokens is not None
    assert big.shards[0].max_kv_tokens < 128 * 2048


def test_on_a_gpu_the_kv_pool_is_left_to_the_measurement_unless_asked_for() -> None:
    assert plan(cuda(100)).shards[0].max_kv_tokens is None
    assert plan(cuda(100), max_batch_total_tokens=5000).shards[0].max_kv_tokens == 5000
    assert plan(cuda(100), max_batch_total_tokens=5000).router.max_batch_total_tokens == 5000


def test_a_kv_pool_that_is_too_large_is_reduced_to_what_fits() -> None:
    made = plan(max_batch_total_tokens=2**31)
    assert made.router.max_batch_total_tokens == made.shards[0].max_kv_tokens
    assert (made.shards[0].max_kv_tokens or 0) < 2**31
    assert "max_batch_total_tokens" in made.warnings[0]


def test_a_step_budget_above_the_kv_pool_is_lowered_when_nobody_asked_for_it() -> None:
    assert plan(max_batch_total_tokens=256).shards[0].max_step_tokens == 256


def test_rows_come_from_max_batch_size_else_from_the_requests_admitted() -> None:
    assert plan().shards[0].max_rows == 128
    assert plan(max_batch_size=5).shards[0].max_rows == 5
    assert plan(max_batch_size=5).router.max_batch_size == 5
    assert plan(max_concurrent_requests=9).shards[0].max_rows == 9
    assert plan(max_concurrent_requests=100_000).shards[0].max_rows == MAX_DEFAULT_ROWS
    assert plan(max_batch_prefill_tokens=32).shards[0].max_rows == 32


def test_a_total_beyond_the_models_positions_is_refused_unless_they_are_stretched() -> None:
    assert "the model has 2048 positions" in error(plan, max_total_tokens=4096)
    assert plan(max_total_tokens=4096, rope_factor=2.0).shards[0].max_total_tokens == 4096


def test_an_input_limit_beyond_the_models_positions_is_refused() -> None:
    assert error(plan, max_input_tokens=2048) == "`max_input_tokens`(2048) must be < `max_total_tokens`(2048)"


def test_limits_left_open_stay_open_for_the_shard_and_are_shown() -> None:
    made = plan()
    assert made.shards[0].max_total_tokens is None
    assert row(made, "max_total_tokens") == ("2048", "model max_position_embeddings")
    assert row(made, "max_input_tokens") == ("2047", "max_total_tokens - 1")
    unknown = plan(facts=make_facts(max_position_embeddings=None))
    assert row(unknown, "max_total_tokens")[0] == "measured" == row(unknown, "max_input_tokens")[0]


def test_the_older_name_of_the_input_limit_works() -> None:
    made = plan(max_input_length=100)
    assert made.router.max_input_tokens == 100
    assert row(made, "max_input_tokens") == ("100", "flag --max-input-length")


# -- what the children are told


def test_every_rank_gets_the_same_but_its_rank() -> None:
    shards = plan(cpu(cores=4), num_shard=2).shards
    assert [shard.rank for shard in shards] == [0, 1]
    assert dataclasses.replace(shards[1], rank=0) == shards[0]
    assert shards[0].num_threads == 2


def test_threads_come_from_the_flag_then_the_environment_then_the_cores() -> None:
    source, facts = ModelSource("/m", "m", "x"), make_facts()

    def threads(flags: Flags, ambient: Ambient) -> int | None:
        return make_plan(flags, source, facts, cpu(cores=6), ambient).shards[0].num_threads

    assert threads(Flags(), Ambient()) == 6
    assert threads(Flags(), Ambient(omp_num_threads=3)) == 3
    assert threads(make_flags(num_threads=2), Ambient(omp_num_threads=3)) == 2
    assert threads(make_flags(num_shard=8), Ambient()) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (None, None)),
        ({"rope_factor": 2.0}, ("linear", 2.0)),
        ({"rope_scaling": "dynamic"}, ("dynamic", 1.0)),
        ({"rope_scaling": "linear", "rope_factor": 4.0}, ("linear", 4.0)),
    ],
)
def test_rope_flags_follow_tgis_rule(values: dict[str, Any], expected: tuple[str | None, float | None]) -> None:
    shard = plan(**values).shards[0]
    assert (shard.rope_scaling, shard.rope_factor) == expected


def test_the_prometheus_port_is_used_only_when_it_was_given() -> None:
    assert plan().router.prometheus_port == 0
    assert plan(prometheus_port=9000).router.prometheus_port == 9000
    assert plan(port=9000, prometheus_port=9000).router.prometheus_port == 0


def test_the_collector_and_the_open_paths_reach_the_router() -> None:
    router = plan(otlp_endpoint="http://c:4317", otlp_service_name="mine", open_path=("/metrics", "/info")).router
    assert (router.otlp_endpoint, router.otlp_service_name) == ("http://c:4317", "mine")
    assert router.open_path == ("/metrics", "/info")
    assert plan().router.otlp_endpoint is None
    assert "`otlp_endpoint` is empty" in error(check_flags, make_flags(otlp_endpoint=""), {})


def test_dtype_is_float32_on_a_cpu_and_the_checkpoints_on_a_gpu() -> None:
    assert row(plan(), "dtype")[0] == "float32"
    assert row(plan(cuda(100)), "dtype") == ("bfloat16", "config.json")
    assert row(plan(cuda(100), make_facts(torch_dtype="float32")), "dtype") == ("float16", "default on CUDA")
    assert plan().shards[0].dtype is None
    assert plan(dtype="bfloat16").shards[0].dtype == "bfloat16"


def test_the_compute_type_is_the_environments_else_the_cards_else_tgis_default() -> None:
    source = ModelSource("/m", "m", "x")
    assert plan().router.compute_type == "gpu+optimized"
    assert plan(cuda(100, 100), num_shard=2).router.compute_type == "2-nvidia-h200"
    made = make_plan(Flags(), source, make_facts(), cpu(), Ambient(compute_type="mine"))
    assert made.router.compute_type == "mine"


def test_the_router_ends_before_the_launchers_patience_does() -> None:
    assert plan().router.graceful_termination_timeout_s == 89
    assert plan(graceful_termination_timeout=1).router.graceful_termination_timeout_s == 0.5


def test_other_flags_reach_the_child_they_are_for() -> None:
    made = plan(
        watermark_gamma=0.25, cors_allow_origin=("a",), step_deadline=5.0, max_best_of=9, master_port=1, payload_limit=3
    )
    assert made.shards[0].watermark_gamma == 0.25
    assert made.shards[0].watermark_delta == 2.0
    assert made.shards[0].master_port == 1
    router = made.router
    assert (router.cors_allow_origin, router.step_deadline_s, router.max_best_of, router.payload_limit) == (
        ("a",),
        5,
        9,
        3,
    )


def test_vertex_ais_routes_and_strictness_reach_the_router() -> None:
    made = plan(strict_params=True, aip_predict_route="/p", aip_health_route="/h")
    assert (made.router.strict_params, made.router.aip_predict_route, made.router.aip_health_route) == (
        True,
        "/p",
        "/h",
    )


def test_vertex_ais_port_beats_the_images_but_not_the_command_line() -> None:
    assert plan(aip_http_port=8080).router.port == 8080
    assert make_plan_with_ports({"port": "env"}).router.port == 8080
    assert make_plan_with_ports({"port": "flag"}).router.port == 80


def test_the_table_shows_the_port_that_is_listened_on() -> None:
    both: dict[str, Literal["flag", "env"]] = {"port": "env", "aip_http_port": "env"}
    assert row(make_plan_with_ports(both), "port") == ("8080", "environment AIP_HTTP_PORT")
    assert row(make_plan_with_ports({"port": "flag"}), "port") == ("80", "flag --port")
    assert row(plan(), "port") == ("3000", "default")


@pytest.mark.parametrize("route", ["predict", "", "/{x}", "/a b"])
def test_vertex_ais_routes_are_plain_paths(route: str) -> None:
    assert "must be a path that begins with '/'" in error(check_flags, make_flags(aip_health_route=route), {})
    assert check_flags(make_flags(aip_predict_route="/v1/endpoints/1/deployedModels/2:predict"), {}) == []


def make_plan_with_ports(sources: dict[str, Literal["flag", "env"]]) -> LaunchPlan:
    flags = Flags(port=80, aip_http_port=8080, sources=sources)
    return make_plan(flags, ModelSource("/m", "m", "x"), make_facts(), cpu(), Ambient())


def test_the_table_shows_what_was_given_and_never_a_key() -> None:
    made = plan(api_key="geheim", max_best_of=3)
    assert row(made, "api_key") == ("***", "flag --api-key")
    assert row(made, "max_best_of") == ("3", "flag --max-best-of")
    assert "geheim" not in str(made)


def test_a_quantized_checkpoint_is_refused() -> None:
    assert "'gptq'" in error(plan, facts=make_facts(quantization_config={"quant_method": "gptq"}))


# -- invariants


@settings(max_examples=300, deadline=None)
@given(
    free_gib=st.floats(0.1, 64),
    parameters=st.integers(1, 8_000_000_000),
    layers=st.integers(1, 48),
    shards=st.sampled_from([1, 2, 4, 8]),
    total=st.none() | st.integers(1, 2048),
    step=st.none() | st.integers(1, 20_000),
    pool=st.none() | st.integers(4096, 2**32 - 1),
    rows=st.none() | st.integers(1, 512),
    on_gpu=st.booleans(),
)
def test_a_plan_always_fits_the_memory_it_was_made_for(
    free_gib: float,
    parameters: int,
    layers: int,
    shards: int,
    total: int | None,
    step: int | None,
    pool: int | None,
    rows: int | None,
    on_gpu: bool,
) -> None:
    values = {
        "num_shard": shards,
        "max_total_tokens": total,
        "max_batch_prefill_tokens": None if step is None else min(step, pool or step),
        "max_batch_total_tokens": pool,
        "max_batch_size": rows,
    }
    given_values = {name: value for name, value in values.items() if value is not None}
    facts = make_facts(parameters, num_hidden_layers=layers)
    machine = cuda(*[free_gib] * shards) if on_gpu else cpu(free_gib)
    try:
        made = plan(machine, facts, **given_values)
    except ArgumentValidation:
        return
    shard = made.shards[0]
    device, dtype = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    need = estimate(facts, dtype, shards, device, shard.max_rows)
    kv_tokens = shard.max_kv_tokens or total or 0
    used = need.fixed + shard.max_step_tokens * need.step_per_token + kv_tokens * need.kv_per_token
    assert used * (1 if on_gpu else shards) <= free_gib * GIB
    assert len(made.shards) == shards
    assert shard.max_step_tokens == made.router.max_batch_prefill_tokens >= 1
    assert step is None or shard.max_step_tokens <= step
    assert total is None or kv_tokens >= total
    assert all(row.value and row.reason for row in made.resolved)
