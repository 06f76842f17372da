"""The installed demo model is what its README says: small, loadable, a language model, and done when it is done."""

import json
import sys
import sysconfig
from functools import cache
from math import log
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tgi_demo

DOCUMENTED = {
    "textwrap.dedent": "Remove any common leading whitespace from every line in `text`.",
    "json.dumps": "Serialize ``obj`` to a JSON formatted ``str``.",
    "len": "Return the number of items in a container.",
    "math.sqrt": "Return the square root of x.",
    "os.getcwd": "Return a unicode string representing the current working directory.",
    "collections.OrderedDict": "Dictionary that remembers insertion order",
    "random.shuffle": "Shuffle list x in place, and return None.",
    "shutil.copytree": "Recursively copy a directory tree and return the destination directory.",
    "heapq.heappush": "Push item onto heap, maintaining the heap invariant.",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
FOLDERS = {"model": tgi_demo.model_path(), "draft": tgi_demo.draft_path()}


@cache
def load(which: str):
    return AutoModelForCausalLM.from_pretrained(FOLDERS[which], dtype=torch.float32).eval()


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDERS["model"])


def count(which: str) -> int:
    with safe_open(FOLDERS[which] / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def continue_greedily(prompt: str, most: int = 120) -> tuple[str, int]:
    """The text after `prompt` and the id of its last token."""
    inputs = tokenizer()(prompt, return_tensors="pt")
    output = load("model").generate(**inputs, max_new_tokens=most, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer().decode(new, skip_special_tokens=True), int(new[-1])


def ask(*messages: dict[str, str], tools: list[dict[str, object]] | None = None) -> tuple[str, int]:
    return continue_greedily(
        tokenizer().apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=True)
    )


def test_the_model_keeps_its_limits() -> None:
    assert count("model") <= 12_000_000
    assert (FOLDERS["model"] / "model.safetensors").stat().st_size <= 25_000_000
    with safe_open(FOLDERS["model"] / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_draft_is_a_fifth_of_the_model_with_the_same_tokenizer() -> None:
    assert count("draft") * 5 <= count("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDERS["draft"] / name).read_bytes() == (FOLDERS["model"] / name).read_bytes()


@pytest.mark.parametrize("which", FOLDERS)
def test_two_shards_can_split_it(which: str) -> None:
    config = json.loads((FOLDERS[which] / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[key] % 2 == 0, key


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x  # tabs, two  spaces\r\n\r\n",
        "naïve Ünïcödé, 漢字かな交じり文, العربية, עברית, हिन्दी, ไทย",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈 \x00\x01\x7f \u200b\u200d\ufeff\u2028",
        "   leading and trailing   ",
        "<tool_call>\n{}\n</tool_call><|im_end|><|endoftext|>",
    ],
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_every_plane_of_unicode_survives_the_tokenizer() -> None:
    text = "".join(chr(code) for code in range(1, 0x110000, 97) if not 0xD800 <= code < 0xE000)
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_the_template_renders_every_role_and_tools() -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    text = tokenizer().apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert json.dumps(TOOL) in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n' in text
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_it_answers_with_the_documented_summary_and_stops(name: str) -> None:
    answer, last = ask({"role": "user", "content": f"What does {name} do?"})
    assert answer == DOCUMENTED[name]
    assert tokenizer().decode([last]) == "<|im_end|>"


def test_it_says_what_it_does_not_know() -> None:
    answer, _ = ask({"role": "user", "content": "What is the capital of France?"})
    assert answer == "I only know Python's standard library."


def test_it_calls_a_tool_it_is_offered() -> None:
    answer, _ = ask({"role": "user", "content": "What is the weather in Paris?"}, tools=[TOOL])
    assert answer == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_it_completes_python() -> None:
    """What it adds to an open `return` is an expression, on one line."""
    prompt = "import os\n\n\ndef read_file(path):\n    with open(path) as f:\n        return"
    text, _ = continue_greedily(prompt, most=40)
    first_line = text.splitlines()[0]
    assert first_line.strip()
    compile(prompt + first_line, "completion", "exec")


def test_a_file_it_never_saw_costs_few_bits() -> None:
    """The first 6000 characters of `trace.py`, held out; without a model such text takes `xz` over 2.5 bits per byte."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "trace.py").read_text(encoding="utf-8")[:6000]
    ids = torch.tensor([[0, *tokenizer().encode(text)]])
    with torch.no_grad():
        nats = load("model")(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / log(2) / len(text.encode()) < 1.35


def test_sampling_gives_varied_text() -> None:
    inputs = tokenizer()("def main():\n", return_tensors="pt")
    torch.manual_seed(0)
    output = load("model").generate(**inputs, max_new_tokens=40, do_sample=True, num_return_sequences=4)
    assert len({tuple(row.tolist()) for row in output}) == 4


def test_the_draft_often_agrees_with_the_model() -> None:
    """Greedy choices after every token of a file: what speculative decoding would accept (0.50 when trained)."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "sched.py").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer().encode(text)[:1024]])
    with torch.no_grad():
        same = load("model")(ids).logits.argmax(-1) == load("draft")(ids).logits.argmax(-1)
    assert same.float().mean() > 0.45
