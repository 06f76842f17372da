"""`.bin` checkpoints become safetensors once, whole, and without executing anything."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_driver import Driver, load
from safetensors.torch import load_file
from tgi_shard.convert import convert, target_name
from tgi_shard.errors import StartError


@pytest.fixture
def model(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(tmp_path)
    return transformers.LlamaForCausalLM(config).eval()


def expected_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[1, 2, 3]])).logits[0]
    return logits


def test_a_single_file_with_a_tied_head(model: Any, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"lr": torch.ones(1)}, tmp_path / "training_args.bin")
    assert convert(tmp_path, tmp_path) == [tmp_path / "model.safetensors"]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(Driver(load(tmp_path)).prompt("a", [1, 2, 3]), expected_logits(model))
    assert not list(tmp_path.glob(".*"))  # no temporary files stay


@pytest.mark.parametrize("zipped", [True, False])  # torch's file format since 1.6, and before
def test_sharded_files_get_an_index_and_go_where_they_are_wanted(model: Any, tmp_path: Path, zipped: bool) -> None:
    state, weight_map = model.state_dict(), {}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "stray.bin").write_bytes(b"not in the index")
    out = tmp_path / "out"
    files = convert(tmp_path, out)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (out / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    torch.testing.assert_close(Driver(load(out)).prompt("a", [1, 2, 3]), expected_logits(model))
    times = [file.stat().st_mtime_ns for file in files]
    convert(tmp_path, out)
    assert [file.stat().st_mtime_ns for file in files] == times  # nothing is converted twice


def test_only_the_tied_head_is_left_out_when_tensors_share_memory(model: Any, tmp_path: Path) -> None:
    state = model.state_dict()
    norm = state["model.norm.weight"]
    state["model.layers.0.input_layernorm.weight"] = norm
    torch.save(state, tmp_path / "pytorch_model.bin")
    convert(tmp_path, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["model.layers.0.input_layernorm.weight"], norm)
    assert set(state) - set(written) == {"lm_head.weight"}


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", ["pickle", "garbage", "nested", "empty"])
def test_what_is_not_a_file_of_tensors_is_refused_unexecuted(
    content: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    match content:
        case "pickle":
            file.write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
        case "garbage":
            file.write_bytes(b"PK\x03\x04 this is no archive")
        case "nested":
            torch.save({"state_dict": {"a": torch.ones(1)}}, file)
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(StartError, match=r"pytorch_model.bin: refused, because it is not a") as caught:
        convert(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_directory_without_weights_and_a_wrong_index_are_explained(model: Any, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"there is no \*.bin and no \*.pt file"):
        convert(tmp_path, tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    with pytest.raises(StartError, match="`/etc/passwd` is not a file in the same directory"):
        convert(tmp_path, tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(StartError, match="not an index"):
        convert(tmp_path, tmp_path)


def test_names_are_those_of_tgi_without_its_bug() -> None:
    assert target_name(Path("x/pytorch_model.bin")) == "model.safetensors"
    assert target_name(Path("checkpoint.pt")) == "checkpoint.safetensors"  # TGI: eckpoint.safetensors
