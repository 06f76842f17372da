"""What a model directory says about the model, without loading it: config.json and the headers of the weight files.

Reads a few kilobytes per file. The shard checks names and shapes strictly when it loads; here only what planning needs.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tgi_proto.model_files import open_file, read_file

from .errors import ArgumentValidation

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAFETENSORS_DTYPES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER_BYTES = 100_000_000
_MULTI_QUERY = ("falcon", "gpt_bigcode")  # have one key head unless config.json says `multi_query: false`


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of the checkpoint together."""

    num_parameters: int
    file_bytes: int
    dtype: str  # the type most parameters have: float32 | bfloat16 | float16, else the checkpoint's own name


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shapes from config.json; 0 where it does not say."""

    model_type: str
    max_positions: int | None
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    quant_method: str | None
    dtype: str | None  # what config.json says
    weights: Weights


def _first_int(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < 2**31:
                raise ArgumentValidation(f"config.json: `{name}` is {value}, expected a number from 0 to 2^31 - 1")
            return value
    return 0


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Those of the config; one under Falcon's and StarCoder's `multi_query`, which Falcon's newer layout ignores."""
    is_new = config.get("new_decoder_architecture", "n_head_kv" in config)
    if not is_new and config.get("multi_query", config.get("model_type") in _MULTI_QUERY):
        return 1
    return _first_int(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads


def parse_config(config: Mapping[str, Any], weights: Weights) -> ModelFacts:
    """The facts in a parsed config.json. A nested `text_config` is used where there is one."""
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else dict(config)
    hidden = _first_int(text, "hidden_size", "n_embd", "d_model")
    heads = _first_int(text, "num_attention_heads", "n_head", "num_heads", "n_heads")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    dtype = text.get("dtype") or text.get("torch_dtype")
    return ModelFacts(
        model_type=str(config.get("model_type", "unknown")),
        max_positions=_first_int(text, "max_position_embeddings", "max_seq_len", "n_positions", "seq_length") or None,
        hidden_size=hidden,
        ffn_size=_first_int(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden,
        num_layers=_first_int(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        num_heads=heads,
        num_kv_heads=_kv_heads(text, heads),
        head_dim=_first_int(text, "head_dim") or (hidden // heads if heads else 0),
        vocab_size=_first_int(text, "vocab_size"),
        quant_method=None if method is None else str(method),
        dtype=None if dtype is None else str(dtype),
        weights=weights,
    )


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that make up the model, in order: the one, or the index's, or all (the shard's rule)."""
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ArgumentValidation(f"`{index}` has no `weight_map`: the checkpoint is damaged")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ArgumentValidation(f"`{index}` names {name[:200]!r}, which is no weight file in its directory")
        return [model_dir / name for name in names]
    return sorted(p for p in model_dir.glob("*.safetensors") if is_weight_name(p.name))


def is_weight_name(name: str) -> bool:
    """Whether a *.safetensors or *.bin file belongs to the model (TGI's rule, and not an adapter or a second copy)."""
    other = ("arguments", "args", "training", "adapter_model", "consolidated", "optimizer", "scheduler", "rng_state")
    return not any(word in name for word in other)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises ArgumentValidation with the file's name."""
    try:
        value = json.loads(read_file(path))
    except OSError as error:
        raise ArgumentValidation(f"`{path}` cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentValidation(f"`{path}` is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentValidation(f"`{path}` does not hold a JSON object")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ArgumentValidation when the file is missing, cut off or hostile."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ArgumentValidation(f"`{path}` is no safetensors file, or was cut off ({size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ArgumentValidation(f"the weight file `{path}` cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentValidation(f"`{path}` has a damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ArgumentValidation(f"`{path}` has a damaged safetensors header")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        if not _is_tensor(entry):
            raise ArgumentValidation(f"`{path}` has a damaged safetensors header: its tensor {name[:200]!r}")
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end > size:
        raise ArgumentValidation(
            f"`{path}` was cut off: its header describes {8 + length + end} bytes, it has {size}; download it again"
        )
    return tensors


def _is_tensor(entry: Any) -> bool:
    """Whether a header's entry can be counted; the shard checks whether it is true."""
    if not isinstance(entry, dict):
        return False
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    numbers = [*shape, *offsets]
    return len(offsets) == 2 and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def read_weights(model_dir: Path) -> Weights:
    """Sizes and type of the checkpoint in `model_dir`."""
    files = weight_files(model_dir)
    if not files:
        raise ArgumentValidation(f"`{model_dir}` holds no *.safetensors weights")
    counts: dict[str, int] = {}
    for path in files:
        for entry in read_header(path).values():
            counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + prod(entry["shape"])
    main = max(sorted(counts), key=lambda name: counts[name], default="F32")
    file_bytes = sum(count * _SAFETENSORS_DTYPES.get(name, 1) for name, count in counts.items())
    return Weights(sum(counts.values()), file_bytes, _NAMES.get(main, main))


def read_model(model_dir: Path) -> ModelFacts:
    """Everything the planner needs about the model in `model_dir`."""
    return parse_config(read_json(model_dir / "config.json"), read_weights(model_dir))
