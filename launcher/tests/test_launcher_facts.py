"""What config.json and safetensors headers say, and the errors when they are damaged."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tgi_launcher.errors import ArgumentValidation
from tgi_launcher.facts import Weights, parse_config, read_header, read_json, read_model, read_weights, weight_files


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: str, *shape: int, end: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, end]}


def sentence(call: Any, *args: Any) -> str:
    with pytest.raises(ArgumentValidation) as info:
        call(*args)
    return info.value.sentence


def test_names_of_other_families_are_understood() -> None:
    facts = parse_config(
        {"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 99, "vocab_size": 7},
        Weights(1, 4, "float32"),
    )
    assert (facts.hidden_size, facts.num_heads, facts.num_layers, facts.max_positions) == (48, 6, 3, 99)
    assert (facts.num_kv_heads, facts.head_dim, facts.ffn_size, facts.dtype) == (6, 8, 192, None)


def test_a_nested_text_config_and_a_quantization_are_seen() -> None:
    config = {
        "model_type": "gemma3",
        "text_config": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "dtype": "bfloat16"},
        "quantization_config": {"quant_method": "awq"},
    }
    facts = parse_config(config, Weights(1, 4, "float32"))
    assert (facts.hidden_size, facts.head_dim, facts.quant_method, facts.dtype) == (64, 32, "awq", "bfloat16")


def test_a_model_directory_is_read(model_dir: Path) -> None:
    facts = read_model(model_dir)
    assert facts.weights == Weights(2048, 8192, "float32")
    assert facts.max_positions == 128


def test_the_index_decides_which_files_belong(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": tensor("BF16", 3, 4, end=24)}, bytes(24))
    write(tmp_path / "b.safetensors", {"y": tensor("F32", 5, end=20), "__metadata__": {"format": "pt"}}, bytes(20))
    index = {"weight_map": {"y": "b.safetensors", "x": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write(tmp_path / "other.safetensors", {})
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    assert read_weights(tmp_path) == Weights(17, 44, "bfloat16")
    (tmp_path / "a.safetensors").unlink()
    assert "a.safetensors` cannot be read: No such file" in sentence(read_weights, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "`weight_map`" in sentence(weight_files, tmp_path)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    assert "no *.safetensors" in sentence(read_weights, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no safetensors file"),
        (b"short", "no safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "no safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "damaged"),
        (struct.pack("<Q", 2) + b"{]", "damaged"),
        (struct.pack("<Q", 7) + b'{"x":1}', "damaged"),
        (struct.pack("<Q", 8) + b'{"x":{}}', "damaged"),
    ],
)
def test_damaged_headers_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = sentence(read_header, path)
    assert words in message
    assert str(path) in message


def test_a_file_that_was_cut_off_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"x": tensor("F32", 100, end=400)}, bytes(100))
    assert "was cut off: its header describes" in sentence(read_header, path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert "cannot be read: No such file" in sentence(read_json, path)
    path.write_text("{")
    assert "is not valid JSON" in sentence(read_json, path)
    path.write_text("[]")
    assert "does not hold a JSON object" in sentence(read_json, path)
