"""The catalogue of broken and hostile model directories: each is refused in one line by the program that reads it.

Every fault goes through the programs' own `main`: the launcher's `--plan`, the shard's `serve` or `convert`, the
router's start. Wanted of each: status 1, one line that names what is wrong, nothing executed, nothing large allocated,
no waiting. What only the shard can know (the launcher reads no more than it needs) the launcher plans.
"""

import json
import logging
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from api_kit import tiny_tokenizer
from safetensors.torch import load_file, save_file
from tgi_launcher import cli as launcher
from tgi_router import cli as router
from tgi_shard import cli as shard

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 32,
}
SHAPES = {
    "model.embed_tokens.weight": [512, 16],
    "model.layers.0.self_attn.q_proj.weight": [16, 16],
    "model.layers.0.self_attn.k_proj.weight": [8, 16],
    "model.layers.0.self_attn.v_proj.weight": [8, 16],
    "model.layers.0.self_attn.o_proj.weight": [16, 16],
    "model.layers.0.mlp.gate_proj.weight": [24, 16],
    "model.layers.0.mlp.up_proj.weight": [24, 16],
    "model.layers.0.mlp.down_proj.weight": [16, 24],
    "model.layers.0.input_layernorm.weight": [16],
    "model.layers.0.post_attention_layernorm.weight": [16],
    "model.norm.weight": [16],
    "lm_head.weight": [512, 16],
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LIMIT_BYTES = 256 << 20  # what refusing a model may take; several times a real header

Breaking = Callable[[Path], Any]


@dataclass(frozen=True)
class Fault:
    """How to break a model, and what a program says. launcher: None = its plan stands."""

    breaking: Breaking
    launcher: str | None
    shard: str


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return tiny_tokenizer()


@pytest.fixture
def model(tmp_path: Path, tokenizer_json: str) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in SHAPES.items()}, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text(tokenizer_json)
    return directory


# ---- ways to break it


def raw(header: bytes, data: bytes = b"", length: int | None = None, size: int | None = None) -> Breaking:
    """A weight file with this header. length: what it claims; size: of the file, a hole at its end."""

    def write(model: Path) -> None:
        claim = struct.pack("<Q", len(header) if length is None else length)
        (model / WEIGHTS).write_bytes(claim + header + data)
        if size is not None:
            os.truncate(model / WEIGHTS, size)

    return write


def one(data: bytes = bytes(8), **entry: Any) -> Breaking:
    """A weight file with the one tensor `a`."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return raw(json.dumps({"a": fields}).encode(), data)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Breaking:
    def write(model: Path) -> None:
        content = load_file(model / WEIGHTS)
        change(content)
        save_file(content, model / WEIGHTS)

    return write


def config(**changes: Any) -> Breaking:
    return lambda model: (model / "config.json").write_text(json.dumps(CONFIG | changes))


def without(name: str) -> Breaking:
    rest = {key: value for key, value in CONFIG.items() if key != name}
    return lambda model: (model / "config.json").write_text(json.dumps(rest))


def text(name: str, content: str | bytes) -> Breaking:
    return lambda model: (model / name).write_bytes(content.encode() if isinstance(content, str) else content)


def index(*files: str) -> Breaking:
    """The weights in part.safetensors, and an index that names `files`."""

    def write(model: Path) -> None:
        (model / WEIGHTS).rename(model / "part.safetensors")
        (model.parent / "outside.safetensors").write_bytes((model / "part.safetensors").read_bytes())
        weight_map = {f"tensor{number}": file for number, file in enumerate(files)}
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def replaced(name: str, by: Callable[[Path], Any]) -> Breaking:
    """Something else in the place of a file."""

    def write(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        by(model / name)

    return write


def link(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def own_code(model: Path) -> None:
    """A repository with a model class of its own, which leaves a canary when it is imported."""
    (model / "modeling_own.py").write_text("open('executed', 'w').close()\nclass Own: ...\n")
    config(model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})(model)


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def payload(model: Path) -> None:
    (model / WEIGHTS).write_bytes(pickle.dumps({"a": Payload()}))


NORM = "model.norm.weight"
OVERLAP = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
).encode()
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
NO_FILE, NOT_A_FILE, DAMAGED = "no safetensors file", "it is no regular file", "damaged safetensors header"

FAULTS = {
    # headers
    "an empty file": Fault(text(WEIGHTS, b""), NO_FILE, "truncated"),
    "a header of 2^60 bytes": Fault(raw(b"{}", length=2**60), NO_FILE, "its header should end at byte"),
    "a header of 200 MB": Fault(
        raw(b"{}", length=200_000_000, size=300_000_000), NO_FILE, "at most 100000000 are allowed"
    ),
    "a pickle for safetensors": Fault(payload, NO_FILE, "truncated"),
    "a header that is no JSON": Fault(raw(b"\x80" * 9), DAMAGED, "its header is not JSON"),
    "a header nested for ever": Fault(raw(b"[" * 100_000), DAMAGED, "its header is not JSON"),
    "a header that is a list": Fault(raw(b"[]"), DAMAGED, "its header is not JSON"),
    "a tensor twice": Fault(raw(TWICE, bytes(8)), None, "`a` comes twice"),
    "overlapping tensors": Fault(raw(OVERLAP, bytes(12)), None, "tensor `b` overlaps with `a`"),
    "offsets beyond the file": Fault(one(b""), "was cut off", "truncated: its tensors end at byte"),
    "offsets of 2^62": Fault(one(data_offsets=[0, 2**62], shape=[2**60]), "was cut off", "truncated: its tensors end"),
    "a hole": Fault(one(bytes(12), data_offsets=[4, 12]), None, "tensor `a` leaves a gap"),
    "bytes of no tensor": Fault(one(bytes(12)), None, "4 bytes after its last tensor"),
    "an unknown type": Fault(one(dtype="F4"), None, "tensor `a` has dtype 'F4'"),
    "a type that is a list": Fault(one(dtype=[]), "its tensor 'a'", "entry for tensor `a` is malformed"),
    "a shape that is no list": Fault(one(shape={"2": 2}), "its tensor 'a'", "entry for tensor `a` is malformed"),
    "a shape that lies": Fault(one(shape=[3]), None, "takes 8 bytes, but its shape and dtype need"),
    "a negative dimension": Fault(one(shape=[-2]), "its tensor 'a'", "tensor `a` has a shape or offsets that"),
    "a dimension of 10^400": Fault(one(shape=[10**400]), "its tensor 'a'", "tensor `a` has a shape or offsets that"),
    "a million dimensions": Fault(one(shape=[2] * 10**6), "its tensor 'a'", "`a` has 1000000 dimensions; at most 64"),
    "negative offsets": Fault(one(data_offsets=[-8, 0]), "its tensor 'a'", "tensor `a` has a shape or offsets that"),
    "a name of two lines": Fault(
        raw(json.dumps({"a\nERROR b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode(), bytes(8)),
        None,
        r"'a\nERROR b'",
    ),
    "truncated data": Fault(
        lambda model: os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 10), "was cut off", "truncated"
    ),
    # tensors
    "a tensor missing": Fault(tensors(lambda t: t.pop(NORM)), None, f"tensor `{NORM}` of shape [16] is missing"),
    "a tensor too many": Fault(tensors(lambda t: t.update(extra=torch.ones(1))), None, "tensor `extra` would not be"),
    "a tensor of another shape": Fault(
        tensors(lambda t: t.update({NORM: torch.ones(15)})), None, f"tensor `{NORM}` has shape [15], but config.json"
    ),
    # the index
    "an index out of the directory": Fault(
        index("../outside.safetensors"), "'../outside.safetensors'", "`../outside.safetensors` is not the name of a"
    ),
    "an index with an absolute path": Fault(index("/etc/passwd"), "'/etc/passwd'", "`/etc/passwd` is not the name"),
    "an index of the directory above": Fault(index(".."), "lacks `..`", "`..` is not the name of a file"),
    "an index of what is no weights": Fault(index("config.json"), "'config.json'", "`config.json` is not the name"),
    "an index of a missing file": Fault(index("x.safetensors"), "lacks `x.safetensors`", "`x.safetensors` it names is"),
    "an index that is a list": Fault(
        lambda model: (index()(model), (model / INDEX).write_text("[]")), "not hold a JSON object", "not an index"
    ),
    "an index nested for ever": Fault(
        lambda model: (index()(model), (model / INDEX).write_text("[" * 100_000)), "is not valid JSON", "not an index"
    ),
    # what is no file
    "weights linked to a file of the system": Fault(replaced(WEIGHTS, link("/etc/passwd")), NO_FILE, "truncated"),
    "weights linked to nowhere": Fault(replaced(WEIGHTS, link("gone")), "lacks", "No such file or directory"),
    "weights from a device": Fault(replaced(WEIGHTS, link("/dev/zero")), "lacks", NOT_A_FILE),
    "weights from a pipe": Fault(replaced(WEIGHTS, os.mkfifo), "lacks", NOT_A_FILE),
    "weights that are a directory": Fault(replaced(WEIGHTS, os.mkdir), "lacks", NOT_A_FILE),
    "config.json that is a pipe": Fault(replaced("config.json", os.mkfifo), "lacks `config.json`", NOT_A_FILE),
    "config.json that never ends": Fault(replaced("config.json", link("/dev/zero")), "lacks `config.json`", NOT_A_FILE),
    "config.json of a gigabyte": Fault(
        lambda model: os.truncate(model / "config.json", 2**30), "more than 100000000 bytes", "more than 100000000"
    ),
    # config.json
    "no config.json": Fault(lambda model: (model / "config.json").unlink(), "lacks `config.json`", "no config.json"),
    "config.json that is no JSON": Fault(text("config.json", "{"), "config.json` is not valid JSON", "is not JSON"),
    "config.json that is a list": Fault(text("config.json", "[]"), "does not hold a JSON object", "not a JSON object"),
    "config.json nested for ever": Fault(text("config.json", "[" * 100_000), "is not valid JSON", "is not JSON"),
    "no hidden_size": Fault(without("hidden_size"), None, "`hidden_size` is missing"),
    "no heads": Fault(config(num_attention_heads=0), None, "`num_attention_heads` is 0, expected an integer of at"),
    "a negative hidden_size": Fault(config(hidden_size=-1), "`hidden_size` is -1", "`hidden_size` is -1, expected"),
    "10^12 layers": Fault(config(num_hidden_layers=10**12), "`num_hidden_layers` is 1000", "at most 10000"),
    "20,000 layers": Fault(config(num_hidden_layers=20_000), None, "is 20000, expected an integer of at most 10000"),
    "a hidden_size that is text": Fault(config(hidden_size="16"), None, "`hidden_size` is '16', expected an integer"),
    "an activation that is a list": Fault(config(hidden_act=["silu"]), None, "`hidden_act` is ['silu']; known are"),
    "an endless rope_theta": Fault(config(rope_theta=10**400), None, "`rope_theta` is 1000"),
    "a model_type that is a list": Fault(config(model_type=["llama"]), None, "`model_type` is ['llama']; supported"),
    "auto_map without permission": Fault(own_code, None, "The repository's own code (`auto_map`) is not run."),
}


# ---- the programs


@dataclass(frozen=True)
class Ended:
    """A program's end: its status and the errors it wrote."""

    status: object
    errors: list[str]
    with_traceback: bool


Run = Callable[..., Ended]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Calls a program's main; signals, logging and the working directory are put back at the end."""
    root, handled = logging.getLogger(), (signal.SIGINT, signal.SIGTERM)
    handlers, level, before = root.handlers[:], root.level, [signal.getsignal(number) for number in handled]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(main: Callable[[], Any]) -> Ended:
        with pytest.raises(SystemExit) as caught:
            main()
        written = capfd.readouterr()
        records = [json.loads(line) for line in written.out.splitlines() if line.startswith("{")]
        errors = [record["message"] for record in records if record["level"] in ("ERROR", "CRITICAL", "FATAL")]
        errors += [line for line in written.err.splitlines() if line.startswith("Error: ")]
        return Ended(caught.value.code, errors, "Traceback" in written.err + written.out)

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in zip(handled, before, strict=True):
        signal.signal(number, handler)


def serve(model: Path) -> None:
    """The shard, which would end with another sentence after loading."""
    flags = ["--model-dir", str(model), "--model-id", "m", "--num-threads", "1", "--device", "cpu"]
    shard.main(["serve", *flags, "--faults", "warmup:raise"])


def plan(model: Path) -> None:
    prefix = str(model.parent / "s")
    launcher.main(["--model-id", str(model), "--plan", "--json-output", "--port", "0", "--shard-uds-path", prefix])


def assert_refused(ended: Ended, sentence: str, directory: Path) -> None:
    assert ended.status == 1
    assert len(ended.errors) == 1
    assert sentence in ended.errors[0]
    assert "\n" not in ended.errors[0]
    assert len(ended.errors[0]) < 2000
    assert not ended.with_traceback
    assert not list(directory.rglob("executed*"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_model_is_refused_in_one_line(name: str, model: Path, run: Run, tmp_path: Path) -> None:
    fault = FAULTS[name]
    fault.breaking(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = run(lambda: plan(model))
    if fault.launcher is None:
        assert (planned.status, planned.errors) == (0, [])
    else:
        assert_refused(planned, fault.launcher, tmp_path)
    assert_refused(run(lambda: serve(model)), fault.shard, tmp_path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < LIMIT_BYTES


def test_the_model_is_whole_without_a_fault_and_through_the_links_of_the_hubs_cache(model: Path, run: Run) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for linked in (False, True):
        if linked:
            for number, path in enumerate(sorted(model.iterdir())):
                path.rename(blobs / str(number))
                path.symlink_to(f"../blobs/{number}")
        assert run(lambda: plan(model)).status == 0
        assert "warmup" in run(lambda: serve(model)).errors[0]  # the fault that ends it behind all that is read


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}'])
def test_a_broken_generation_config_is_refused(content: str, model: Path, run: Run, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text(content)
    assert_refused(run(lambda: serve_whole(model)), "generation_config.json", tmp_path)


def serve_whole(model: Path) -> None:
    """The shard, with nothing to end it but what it reads."""
    flags = ["--model-dir", str(model), "--model-id", "m", "--num-threads", "1", "--device", "cpu"]
    shard.main(["serve", *flags, "--max-step-tokens", "16", "--max-rows", "2", "--max-kv-tokens", "64"])


# ---- pickles


def saved(state: Any) -> Breaking:
    return lambda model: torch.save(state, model / "pytorch_model.bin")


PICKLES: dict[str, tuple[Breaking, str]] = {
    "a payload": (text("pytorch_model.bin", pickle.dumps({"a": Payload()}, protocol=2)), "refused, because it is not"),
    "a payload in torch's format": (saved({"a": Payload()}), "refused, because it is not a plain file of tensors"),
    "an empty stack": (text("pytorch_model.bin", b"\x80\x02\x86."), "refused, because it is not a plain file"),
    "a list": (saved([torch.ones(1)]), "refused, because it is not a dictionary of tensors"),
    "a sparse tensor": (saved({"a": torch.ones(2).to_sparse()}), "tensor `a` is not dense"),
    "a tensor without values": (saved({"a": torch.ones(2, device="meta")}), "tensor `a` is not dense"),
    "a terabyte in four bytes": (saved({"a": torch.ones(1).expand(2**38)}), "tensor `a` of shape [274877906944] has"),
    "a pipe": (replaced("pytorch_model.bin", os.mkfifo), NOT_A_FILE),
    "an index out of the directory": (
        text("pytorch_model.bin.index.json", '{"weight_map": {"a": "../x.bin"}}'),
        "`../x.bin` is not a file in the same directory",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused_unexecuted(name: str, model: Path, run: Run, tmp_path: Path) -> None:
    breaking, sentence = PICKLES[name]
    (model / WEIGHTS).unlink()
    breaking(model)
    ended = run(lambda: shard.main(["convert", str(model), "--json-output"]))
    assert_refused(ended, sentence, tmp_path)
    assert not list(model.glob("*.safetensors"))


# ---- texts

TEXTS: dict[str, tuple[Breaking, str]] = {
    "tokenizer.json that is no JSON": (text("tokenizer.json", "{"), "`tokenizer.json` of the model cannot be read"),
    "tokenizer.json of no kind": (text("tokenizer.json", "[]"), "`tokenizer.json` of the model cannot be read"),
    "tokenizer.json that is a pipe": (replaced("tokenizer.json", os.mkfifo), "no `tokenizer.json`"),
    "tokenizer_config.json a pipe": (replaced("tokenizer_config.json", os.mkfifo), NOT_A_FILE),
    "tokenizer_config.json a directory": (replaced("tokenizer_config.json", os.mkdir), NOT_A_FILE),
    "tokenizer_config.json nested": (text("tokenizer_config.json", "[" * 100_000), "is not valid JSON"),
    "a template that does not compile": (text("chat_template.jinja", "{% if %}"), "does not compile"),
    "a template that is no text": (text("chat_template.jinja", b"\xff"), "`chat_template.jinja` of the model"),
    "a template nested for ever": (text("chat_template.jinja", "{{ " + "(" * 5_000 + "1"), "nested too deeply"),
    "a template without a name": (
        text("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}'),
        "`chat_template` of the model",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be_used_are_refused_by_the_router(
    name: str, model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking, sentence = TEXTS[name]
    breaking(model)
    flags = ["--model-dir", str(model), "--model-id", "m", "--master-shard-uds-path", str(tmp_path / "none-0")]
    monkeypatch.setattr(sys, "argv", ["text-generation-router", *flags])
    assert_refused(run(router.main), sentence, tmp_path)
