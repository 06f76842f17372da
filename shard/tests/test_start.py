"""Start: what the host allows, how large the pool gets, what files and flags decide. And the fault points."""

import json
import logging
from pathlib import Path

import driving
import pytest
import torch
from safetensors.torch import load_file
from tgi_shard import cli, start, warmup
from tgi_shard.config import ShardConfig
from tgi_shard.errors import StartError
from tgi_shard.faults import Faults, InjectedFault
from tgi_shard.host import available_memory, usable_cores
from tgi_shard.kv_cache import KvCache, KvGeometry
from tgi_shard.models.decoder import Decoder

GIB = 1 << 30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return driving.save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Decoder:
    return driving.load_tiny(model_dir)


def config(**fields: object) -> ShardConfig:
    return ShardConfig(model_dir="/models/x", model_id="x", **fields)


# ---- host


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_cpu_quota_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict, cores: int):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(write(tmp_path, files)) == cores


def test_without_a_quota_all_cores_of_the_affinity_mask_are_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5})
    files = {"cpu.max": "max 100000", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    assert usable_cores(write(tmp_path, files)) == 3


def test_available_memory_is_the_smaller_of_host_and_cgroup(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    assert available_memory(tmp_path / "nothing", meminfo) == 8 * GIB
    v2 = {"memory.max": str(4 * GIB), "memory.current": str(3 * GIB), "memory.stat": f"anon 1\ninactive_file {GIB}"}
    assert available_memory(write(tmp_path / "v2", v2), meminfo) == 2 * GIB
    assert available_memory(write(tmp_path / "v2", {"memory.max": "max"}), meminfo) == 8 * GIB
    v1 = {"memory/memory.limit_in_bytes": str(GIB), "memory/memory.usage_in_bytes": str(GIB // 2)}
    assert available_memory(write(tmp_path / "v1", v1), meminfo) == GIB // 2


# ---- pool


def test_the_pool_is_zero_and_its_layers_do_not_overlap():
    geometry = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.bfloat16)
    pool = KvCache(geometry, 5, torch.device("cpu"))
    assert geometry.block_bytes == 2 * 3 * 4 * 2 * 8 * 2
    assert pool.num_bytes == 5 * geometry.block_bytes
    for number, (keys, values) in enumerate(pool.layers):
        assert keys.shape == values.shape == (5, 4, 2, 8)
        assert not keys.any()
        keys.fill_(number)
        values.fill_(-number)
    assert all(
        (keys == number).all() and (values == -number).all() for number, (keys, values) in enumerate(pool.layers)
    )


def test_memory_for_the_pool_is_taken_only_when_used():
    geometry = KvGeometry(num_layers=8, num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.float32)
    before = resident()
    pool = KvCache(geometry, (2 * GIB) // geometry.block_bytes, torch.device("cpu"))
    assert resident() - before < 64 << 20
    pool.layers[0][0][:4] = 1.0


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_the_pool_is_what_memory_leaves(model: Decoder):
    shape = driving.make_shape(model, max_rows=16)
    block = shape.geometry.block_bytes
    assert warmup.pool_blocks(config(), shape, 100 * block, 0) == 100
    assert warmup.pool_blocks(config(), shape, 100 * block, 30 * block) == 70
    assert warmup.pool_blocks(config(memory_fraction=0.5), shape, 100 * block, 0) == 50


def test_the_pool_is_not_larger_than_can_be_used(model: Decoder):
    shape = driving.make_shape(model, max_rows=3)
    assert warmup.pool_blocks(config(), shape, GIB, 0) == 3 * 256 // 4
    assert warmup.pool_blocks(config(max_kv_tokens=100), shape, GIB, 0) == 25


def test_a_pool_too_small_for_one_request_is_refused_with_the_numbers(model: Decoder):
    shape = driving.make_shape(model)
    with pytest.raises(StartError) as caught:
        warmup.pool_blocks(config(max_total_tokens=256), shape, 8 << 20, (8 << 20) - 20 * shape.geometry.block_bytes)
    message = str(caught.value)
    for part in (
        "may need 256",
        "8 MiB are free, 7 MiB",
        "`--max-total-tokens` (256)",
        "`--cuda-memory-fraction` (1.0)",
    ):
        assert part in message
    free = 20 * shape.geometry.block_bytes
    assert warmup.pool_blocks(config(), shape, free, 0) == 20  # no limit was asked for: the pool decides


def test_measuring_runs_two_small_steps_and_estimates(model: Decoder):
    shape = driving.make_shape(model)
    assert warmup.measure(model, shape, rank=0) == 4 * (256 * 48 * 24 + 16 * driving.VOCAB * 4)


def test_ranks_on_a_cpu_share_its_memory():
    cpu = torch.device("cpu")
    assert warmup.free_memory(cpu, 4) <= warmup.free_memory(cpu, 1) // 3


# ---- start


def test_prepare_gives_an_engine_that_generates(model_dir: Path):
    values = {"max_step_tokens": 64, "max_rows": 4, "block_size": 4, "num_threads": 1, "max_kv_tokens": 256}
    shard = ShardConfig(model_dir=str(model_dir), model_id="tiny", device="cpu", **values)
    engine, info = start.prepare(shard, logging.getLogger("test"))
    assert info.num_blocks == 64
    d = driving.Driver(engine.step)
    live = d.add([5, 17, 99])
    d.run(3)
    assert len(live.generated) == 3


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"max_total_tokens": 1000}, "`--max-total-tokens` 1000 is more than the 256 positions of the model"),
        ({"max_total_tokens": 200, "max_kv_tokens": 96}, "the KV pool would hold 96 tokens, one request may need 208"),
        ({"max_kv_tokens": 10}, "lower `--max-total-tokens` (unset) or"),
        ({"faults": "nowhere:raise"}, "`--faults` 'nowhere:raise'"),
    ],
)
def test_a_start_that_cannot_be_says_why(model_dir: Path, fields: dict, cause: str):
    shard = ShardConfig(model_dir=str(model_dir), model_id="tiny", device="cpu", num_threads=1, **fields)
    with pytest.raises(StartError) as caught:
        start.prepare(shard, logging.getLogger("test"))
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("hf", "flag", "device", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, None, "cpu", torch.float32),
        ({"torch_dtype": "bfloat16"}, "bfloat16", "cpu", torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, None, "cuda", torch.bfloat16),
        ({"dtype": "bfloat16"}, None, "cuda", torch.bfloat16),
        ({"torch_dtype": "float32"}, None, "cuda", torch.float16),
        ({}, None, "cuda", torch.float16),
        ({}, "float32", "cuda", torch.float32),
    ],
)
def test_the_dtype(hf: dict, flag: str | None, device: str, expected: torch.dtype):
    assert start.choose_dtype(config(dtype=flag), hf, torch.device(device)) == expected


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start.choose_device(config()) == torch.device("cpu")
    with pytest.raises(StartError, match="`--device` cuda"):
        start.choose_device(config(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StartError, match="rank 2 has no GPU: 2 are visible; lower `--num-shard`"):
        start.choose_device(config(rank=2, world_size=4))


@pytest.mark.parametrize(
    ("generation", "hf", "expected"),
    [
        ({"eos_token_id": [1, 5]}, {"eos_token_id": 9}, [1, 5]),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, [0]),
        (None, {"eos_token_id": 9}, [9]),
        ({}, {"eos_token_id": [7]}, [7]),
        (None, {}, []),
    ],
)
def test_eos_ids(tmp_path: Path, generation: dict | None, hf: dict, expected: list[int]):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert start.eos_token_ids(tmp_path, hf) == expected


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "is not a JSON object")]
)
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(StartError, match=message):
        start.read_json(tmp_path / "config.json")


def test_progress_is_shown_a_few_times_a_second_and_at_the_end(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    now = [100.0]
    progress = start.Progress(logging.getLogger("test"), lambda: now[0])
    for done in range(1, 11):
        progress(done, 10)
        now[0] += 0.1
    progress.finish()
    assert [record.done for record in caplog.records] == [1, 4, 7, 10, 10]


# ---- command line


def test_the_command_line_is_tgis(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capfd.readouterr().out
    assert all(command in text for command in ("serve", "download-weights", "convert"))


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]):
    """Runs the command line; returns (status, log messages) and leaves pytest's logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*argv: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(argv))
        lines = capfd.readouterr().out.splitlines()
        return caught.value.code, [json.loads(line)["message"] for line in lines]

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def test_download_weights_accepts_a_local_directory_that_has_them(model_dir: Path, logged):
    status, messages = logged("download-weights", str(model_dir), "--json-output")
    assert (status, messages) == (0, [f"safetensors weights are in {model_dir}"])


def test_download_weights_without_conversion_refuses_bin_weights(tmp_path: Path, logged):
    status, messages = logged("download-weights", str(tmp_path), "--no-auto-convert", "--json-output")
    assert status == 1
    assert messages == [f"{tmp_path} has no *.safetensors, and --no-auto-convert was given"]


def test_download_weights_converts_and_writes_for_people_unless_asked_for_json(
    model_dir: Path, tmp_path: Path, logged, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    torch.save(load_file(model_dir / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit) as caught:
        cli.main(["download-weights", str(tmp_path)])
    assert caught.value.code == 0
    assert f"INFO converted {tmp_path} to safetensors" in capfd.readouterr().out
    converted = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(tensor, converted[name]) for name, tensor in load_file(model_dir / "model.safetensors").items()
    )
    assert logged("convert", str(tmp_path), "--json-output")[0] == 0


def test_download_weights_takes_the_top_of_a_hub_repository(tmp_path: Path, logged, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def snapshot_download(model_id: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((model_id, revision, "*.bin" in allow_patterns))
        if "*.bin" not in allow_patterns:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    status, messages = logged("download-weights", "org/model", "--revision", "main", "--json-output")
    assert (status, messages) == (0, [f"safetensors weights are in {tmp_path}"])
    assert calls == [("org/model", "main", False)]


def test_merging_adapters_is_refused(tmp_path: Path, logged):
    status, messages = logged("download-weights", str(tmp_path), "--merge-lora", "--json-output")
    assert status == 1
    assert messages[0].startswith("`--merge-lora` is not built yet")


def test_serving_what_is_no_model_ends_with_the_cause(tmp_path: Path, logged):
    status, messages = logged("serve", "--model-dir", str(tmp_path), "--model-id", "x", "--num-threads", "1")
    assert status == 1
    assert messages[0] == "importing"
    assert messages[-1] == f"{tmp_path} has no config.json: it is not a model directory"


# ---- faults


def test_no_fault_does_nothing():
    assert Faults(None).hit("step") is False
    assert Faults("step:raise:rank=1", rank=0).hit("step") is False


def test_faults_act_on_their_condition_only(tmp_path: Path):
    faults = Faults(f"step:raise:n=2; row.apply:raise:token=9; row.logits:nan:token=7:once={tmp_path}/mark")
    faults.hit("step")
    with pytest.raises(InjectedFault):
        faults.hit("step")
    faults.hit("step")
    faults.hit("row.apply", [1, 2])
    with pytest.raises(InjectedFault):
        faults.hit("row.apply", [1, 9])
    assert faults.armed("row.logits")
    assert not faults.hit("row.logits", [1])
    assert faults.hit("row.logits", [7])
    assert (tmp_path / "mark").exists()
    assert not faults.hit("row.logits", [7])


@pytest.mark.parametrize(
    "text", ["step", "step:fly", "nowhere:raise", "step:nan", "row.logits:raise", "step:raise:n", "step:raise:x=1"]
)
def test_a_fault_that_is_misspelt_is_refused(text: str):
    with pytest.raises(StartError, match="`--faults`"):
        Faults(text)
