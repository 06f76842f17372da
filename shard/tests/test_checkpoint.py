"""Checkpoints are read strictly: what is broken is named, file and tensor, in one line, before anything is loaded."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_driver import Driver, load
from safetensors.torch import load_file, save_file
from test_families import make_model
from tgi_shard.checkpoint import Checkpoint, read_header
from tgi_shard.errors import Bug, StartError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
WEIGHTS = "model.safetensors"


def shapes(tied: bool = False) -> dict[str, list[int]]:
    """The tensors of such a checkpoint, as transformers names and shapes them."""
    layer = {
        "self_attn.q_proj": [16, 16],
        "self_attn.k_proj": [8, 16],
        "self_attn.v_proj": [8, 16],
        "self_attn.o_proj": [16, 16],
        "mlp.gate_proj": [24, 16],
        "mlp.up_proj": [24, 16],
        "mlp.down_proj": [16, 24],
        "input_layernorm": [16],
        "post_attention_layernorm": [16],
    }
    outer = {"model.embed_tokens.weight": [40, 16], "model.norm.weight": [16]}
    if not tied:
        outer["lm_head.weight"] = [40, 16]
    return outer | {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in shapes().items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write_raw(directory: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with this header, claimed to be `length` bytes long."""
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def write_header(directory: Path, header: dict[str, Any], data: bytes = b"") -> None:
    write_raw(directory, json.dumps(header).encode(), data)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: (directory / "config.json").write_text(json.dumps(CONFIG | changes)) and None


def truncate(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-10])


def index(directory: Path, weight_map: Any) -> None:
    (directory / WEIGHTS).rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def one(**entry: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "there is no *.safetensors file"),
    "no config": (lambda d: (d / "config.json").unlink(), "there is no config.json"),
    "config not json": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "missing tensor": (change_tensors(lambda t: t.pop(DOWN)), f"tensor `{DOWN}` of shape [16, 24] is missing"),
    "missing head": (
        change_tensors(lambda t: t.pop("lm_head.weight")),
        "`lm_head.weight` of shape [40, 16] is missing",
    ),
    "unused tensor": (change_tensors(lambda t: t.update(extra=torch.ones(1))), "tensor `extra` would not be used"),
    "unused bias": (change_config(num_hidden_layers=1), "and 8 more would not be used"),
    "missing layer": (change_config(num_hidden_layers=3), "is missing (and 8 more)"),
    "wrong shape": (
        change_tensors(lambda t: t.update({NORM: torch.ones(15)})),
        f"tensor `{NORM}` has shape [15], but config.json says [16]",
    ),
    "not floating": (change_tensors(lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)})), "expected floating"),
    "truncated": (truncate, "model.safetensors: truncated: its tensors end at byte"),
    "empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), "truncated"),
    "header bomb": (lambda d: write_raw(d, b"{}", length=2**62), "truncated: its header should end at byte"),
    "header not json": (lambda d: write_raw(d, b"\x80" * 9), "its header is not JSON"),
    "header nested": (lambda d: write_raw(d, b"[" * 100_000), "its header is not JSON"),
    "header a list": (lambda d: write_raw(d, b"[]"), "its header is not JSON"),
    "no offsets": (lambda d: write_header(d, {"a": {"dtype": "F32"}}), "entry for tensor `a` is malformed"),
    "negative": (lambda d: write_header(d, one(data_offsets=[-8, 0]), b"0" * 8), "not natural numbers"),
    "float shape": (lambda d: write_header(d, one(shape=[2.0]), b"0" * 8), "not natural numbers"),
    "unknown dtype": (lambda d: write_header(d, one(dtype="F4"), b"0" * 8), "dtype 'F4', which is not supported"),
    "size lies": (
        lambda d: write_header(d, one(shape=[2**40]), b"0" * 8),
        "takes 8 bytes, but its shape and dtype need",
    ),
    "overlap": (
        lambda d: write_header(d, one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"0" * 12),
        "tensor `b` overlaps with `a`",
    ),
    "gap": (lambda d: write_header(d, one(data_offsets=[4, 12]), b"0" * 12), "tensor `a` leaves a gap"),
    "trailing": (lambda d: write_header(d, one(), b"0" * 12), "4 bytes after its last tensor"),
    "beyond the file": (lambda d: write_header(d, one(), b"0" * 4), "truncated"),
    "index leaves folder": (lambda d: index(d, {"a": "../part.safetensors"}), "is not the name of a file in the same"),
    "index names nothing": (lambda d: index(d, {"a": "other.safetensors"}), "`other.safetensors` it names is missing"),
    "index malformed": (lambda d: index(d, ["a"]), "not an index with a `weight_map`"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_model_is_explained_in_one_line(model: Path, fault: str) -> None:
    breaking, message = FAULTS[fault]
    breaking(model)
    with pytest.raises(StartError) as caught:
        load(model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(model: Path) -> None:
    (model / WEIGHTS).rename(model / "a.safetensors")
    (model / "b.safetensors").write_bytes((model / "a.safetensors").read_bytes())
    with pytest.raises(StartError, match=r"b.safetensors: tensor `.*` is also in a.safetensors"):
        load(model)


def test_sharded_files_are_the_single_file(model: Path) -> None:
    expected = Driver(load(model)).prompt("a", [1, 2, 3])
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    assert torch.equal(Driver(load(model)).prompt("a", [1, 2, 3]), expected)  # without an index: all files
    weight_map = {name: file for file, part in parts.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(Driver(load(model)).prompt("a", [1, 2, 3]), expected)


def test_rotary_buffers_and_a_tied_head_may_be_there_and_are_not_read(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"] = torch.full((40, 16), float("nan"))
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.full((2,), float("nan"))
    save_file(tensors, model / WEIGHTS)
    change_config(tie_word_embeddings=True)(model)
    assert Driver(load(model)).prompt("a", [1, 2, 3]).isfinite().all()


def saved(
    directory: Path, config_class: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A tiny model of another family, its tensors changed."""
    make_model(config_class, {}).save_pretrained(directory)
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS)
    return directory


@pytest.mark.parametrize("config_class", ["GPT2Config", "BloomConfig", "OPTConfig", "GPTNeoXConfig"])
def test_a_checkpoint_saved_without_the_outer_module_is_the_same_model(config_class: str, tmp_path: Path) -> None:
    """As the first GPT-2, BLOOM and OPT checkpoints of the Hub are."""
    prefix = {"OPTConfig": "model.", "GPTNeoXConfig": "gpt_neox."}.get(config_class, "transformer.")
    whole = saved(tmp_path / "whole", config_class, lambda tensors: tensors)
    bare = saved(
        tmp_path / "bare", config_class, lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()}
    )
    assert torch.equal(Driver(load(bare)).prompt("a", [1, 2, 3]), Driver(load(whole)).prompt("a", [1, 2, 3]))


def test_a_tied_table_may_be_saved_under_the_heads_name(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", "GemmaConfig", lambda tensors: tensors)
    other = saved(
        tmp_path / "other",
        "GemmaConfig",
        lambda tensors: {k.replace("model.embed_tokens", "lm_head"): v for k, v in tensors.items()},
    )
    assert torch.equal(Driver(load(other)).prompt("a", [1, 2, 3]), Driver(load(whole)).prompt("a", [1, 2, 3]))


@pytest.mark.parametrize(
    ("config_class", "tensor", "shape"),
    [
        ("GPT2Config", "transformer.h.1.attn.c_attn.weight", [48, 144]),  # stored [in, out]
        ("OPTConfig", "model.decoder.embed_positions.weight", [66, 48]),
        ("FalconConfig", "transformer.h.0.self_attention.query_key_value.weight", [64, 48]),
        ("Phi3Config", "model.layers.1.mlp.gate_up_proj.weight", [112, 60]),
        ("MixtralConfig", "model.layers.0.block_sparse_moe.experts.6.w2.weight", [60, 56]),
        ("GraniteMoeConfig", "model.layers.1.block_sparse_moe.input_linear.weight", [8, 112, 60]),
        ("Gemma2Config", "model.layers.0.pre_feedforward_layernorm.weight", [60]),
        ("PhiConfig", "lm_head.bias", [131]),
        ("BloomConfig", "transformer.word_embeddings_layernorm.bias", [48]),
    ],
)
def test_tensors_of_every_kind_are_named_when_they_are_missing(
    config_class: str, tensor: str, shape: list[int], tmp_path: Path
) -> None:
    changes = {"PhiConfig": {"hidden_size": 48, "head_dim": None}, "Phi3Config": {"head_dim": None}}
    make_model(config_class, changes.get(config_class, {})).save_pretrained(tmp_path)
    change_tensors(lambda tensors: tensors.pop(tensor))(tmp_path)
    with pytest.raises(StartError) as caught:
        load(tmp_path)
    assert f"tensor `{tensor}` of shape {shape} is missing" in str(caught.value)


def test_progress_counts_every_byte_that_is_read_once(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(model, lambda done, total: seen.append((done, total)))
    checkpoint.check({name: tuple(shape) for name, shape in shapes().items()}, [])
    total = sum(tensor.nbytes for tensor in load_file(model / WEIGHTS).values())
    for name in [*shapes(), *shapes()]:
        checkpoint.read(name)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(shapes())


def test_tensors_are_views_of_the_file_and_writing_to_them_does_not_change_it(model: Path) -> None:
    before = (model / WEIGHTS).read_bytes()
    checkpoint = Checkpoint.open(model)
    tensor = checkpoint.read(NORM)
    assert torch.equal(tensor, load_file(model / WEIGHTS)[NORM])
    tensor.zero_()
    assert (model / WEIGHTS).read_bytes() == before
    with pytest.raises(Bug):
        checkpoint.read("unheard of")


def test_every_dtype_and_the_empty_tensor_are_read_as_they_were_written(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
    tensors = {str(dtype): torch.tensor([[1, 0, 1]]).to(dtype) for dtype in dtypes} | {"empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / WEIGHTS)
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(read_header(tmp_path / WEIGHTS)) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
