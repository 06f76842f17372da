"""`.bin` checkpoints to safetensors, once. Behind `text-generation-server convert` and the launcher's first start.

Pickles are read with `weights_only=True`: nothing in them is executed. Every output file is written beside its final
name and renamed when it is complete and read back, the index of a sharded checkpoint last. So an interrupted conversion
is continued and never mistaken for a finished one.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tgi_proto.model_files import open_file, read_file
from torch import Tensor

from .checkpoint import INDEX_FILE, Checkpoint, read_header, shown
from .errors import StartError
from .models import describe, hf_config

logger = logging.getLogger(__name__)

BIN_INDEX_FILE = "pytorch_model.bin.index.json"
NOT_WEIGHTS = ("arguments", "args", "training")  # in names of other pickles, such as training_args.bin


def convert(model_dir: Path, out_dir: Path) -> list[Path]:
    """Writes the weights in model_dir as safetensors into out_dir; returns the files, existing ones included.

    Raises StartError.
    """
    sources = _sources(model_dir)
    duplicates = _tied_head(model_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    targets = {source: out_dir / target_name(source) for source in sources}
    todo = {source: target for source, target in targets.items() if not target.exists()}
    _check_space(out_dir, sum(source.stat().st_size for source in todo))
    for number, (source, target) in enumerate(todo.items(), 1):
        start = time.monotonic()
        _convert_file(source, target, duplicates)
        logger.info("Convert: [%d/%d] -- Took: %.1f s (%s)", number, len(todo), time.monotonic() - start, target.name)
    if len(targets) > 1:
        _write_index(out_dir / INDEX_FILE, list(targets.values()))
    return list(targets.values())


def target_name(source: Path) -> str:
    """`pytorch_model-00001-of-00002.bin` → `model-00001-of-00002.safetensors`, as TGI names them."""
    return source.stem.removeprefix("pytorch_") + ".safetensors"


def _sources(model_dir: Path) -> list[Path]:
    """The index's files if there is an index, else all .bin, else all .pt."""
    index = model_dir / BIN_INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(json.loads(read_file(index))["weight_map"].values()))
        except OSError as error:
            raise StartError(f"{index}: cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StartError(f"{index}: not an index with a `weight_map`: {error!r}.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (model_dir / name).is_file():
                raise StartError(f"{index}: `{shown(str(name))}` is not a file in the same directory.")
        return [model_dir / name for name in names]
    for suffix in ("bin", "pt"):
        files = [f for f in sorted(model_dir.glob(f"*.{suffix}")) if not any(word in f.name for word in NOT_WEIGHTS)]
        if files:
            return files
    raise StartError(f"{model_dir}: there is no *.bin and no *.pt file to convert.")


def _tied_head(model_dir: Path) -> dict[str, str]:
    """Tensor that is left out → the tensor it must be the same memory as: the output head of a model that ties it."""
    spec, names = describe(hf_config.read(model_dir))
    return {f"{names.head}.weight": f"{names.embedding}.weight"} if spec.output.tied else {}


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise StartError(
            f"{directory}: converting needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free."
        )


def _convert_file(source: Path, target: Path, duplicates: dict[str, str]) -> None:
    tensors = _load(source)
    for name, original in duplicates.items():
        if name in tensors and original in tensors and tensors[name].data_ptr() == tensors[original].data_ptr():
            del tensors[name]
    # save_file refuses tensors that share memory: what is shared but not tied is written once per name.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        _compare(temporary, tensors)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _load(source: Path) -> dict[str, Tensor]:
    try:
        state = _load_pickle(source)
    except OSError as error:
        raise StartError(f"{source}: cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a forged pickle makes the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise StartError(f"{source}: refused, because it is not a plain file of tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StartError(f"{source}: refused, because it is not a dictionary of tensors.")
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise StartError(f"{source}: tensor `{shown(str(name))}` is not dense, or its values are not in the file.")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # strides can repeat one value
            raise StartError(f"{source}: tensor `{shown(str(name))}` of shape {list(tensor.shape)} has too few values.")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _load_pickle(source: Path) -> object:
    """Mapped, so that memory is not needed for the whole file, unless it has torch's format from before 1.6."""
    with open_file(source) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    return torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)


def _compare(file: Path, tensors: dict[str, Tensor]) -> None:
    """That what was written is what was meant."""
    written = Checkpoint(file.parent, read_header(file))
    for name, tensor in tensors.items():
        if not torch.equal(written.read(name).nan_to_num(), tensor.nan_to_num()):
            raise StartError(f"{file}: tensor `{name}` reads back differently from what was written; check the disk.")


def _write_index(index: Path, files: list[Path]) -> None:
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    content = {
        "metadata": {"total_size": sum(entry.end - entry.begin for entry in entries.values())},
        "weight_map": {name: entry.file.name for name, entry in sorted(entries.items())},
    }
    temporary = index.with_name(f".{index.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, index)
