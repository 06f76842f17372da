"""Prompts become the ids that transformers gives them, whatever kind the tokenizer is of and its config file says."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from api_kit import tiny_tokenizer
from tgi_router import chat_template
from tgi_router.errors import StartupError
from tgi_router.tokenizer import Tokenizer, read_config
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  two spaces, a\ttab\r\nand lines\n\n",
    "Zürich 日本 \U0001f9d1\u200d\U0001f680 \u0000",
    "<s>hello</s> <s> x",
    "a <tool> b<tool>c  <tool>  d<tool>",
    "<unk><|end|>[PAD]<extra>▁under_score",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<tool>{{ m.content }}{{ eos_token }}\n{% endfor %}"


def added(content: str, **others: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **others}


@cache
def sentencepiece_like(kind: str, *, begins: bool) -> str:
    """tokenizer.json of a BPE that falls back to bytes. kind: how spaces become U+2581. begins: `<s>` comes first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrdatbcx", "<tool>"]
    merges = [("h", "e"), ("l", "o"), ("▁", "h"), ("▁h", "e"), ("w", "o"), ("▁", "a")]
    pieces += [a + b for a, b in merges]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    library = LibraryTokenizer(model)
    if kind == "normalizer":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    if begins:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return str(library.to_str())


FILES = {
    "byte-level": tiny_tokenizer(),
    "prepending normalizer": sentencepiece_like("normalizer", begins=True),
    "metaspace first": sentencepiece_like("first", begins=True),
    "metaspace never": sentencepiece_like("never", begins=False),
    "metaspace always, nothing added": sentencepiece_like("always", begins=False),
}
NAMED = {"__type": "AddedToken"}
CONFIGS: dict[str, dict[str, Any]] = {
    "strings": {},
    "objects": {"bos_token": NAMED | added("<s>"), "eos_token": NAMED | added("</s>"), "pad_token": None},
    "add_bos_token": {"add_bos_token": True, "add_eos_token": True},
    "no bos": {"add_bos_token": False},
    "legacy and prefix space": {"legacy": False, "add_prefix_space": True},
    "specials split": {"split_special_tokens": True},
    "additional": {"additional_special_tokens": ["<s>", NAMED | added("</s>")]},
    "limits and padding": {"model_max_length": 4, "padding_side": "left", "truncation_side": "left"},
}


def model(folder: Path, file: str, config: dict[str, Any]) -> Path:
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer.json").write_text(file)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **whole}))
    return folder


def compare(folder: Path) -> None:
    """Plain prompts and chat prompts, with and without what the tokenizer adds."""
    import transformers

    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    config = read_config(folder, None)
    ours = Tokenizer.load(folder, config, 1)
    template = chat_template.load(folder, config, replaced=False)
    try:
        for text in TEXTS:
            for adds in (True, False):
                assert list(ours.encode(text, add_special_tokens=adds)) == theirs.encode(text, add_special_tokens=adds)
            messages = [{"role": "user", "content": text}] * 2
            ids = theirs.apply_chat_template(messages, return_dict=False)
            assert list(ours.encode(template.render(messages), add_special_tokens=False)) == ids
    finally:
        ours.close()


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ids_are_those_of_transformers(tmp_path: Path, file: str, config: dict[str, Any]) -> None:
    compare(model(tmp_path, file, config))


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"special": False}, {"single_word": True}])
@pytest.mark.parametrize("file", list(FILES.values())[1:], ids=list(FILES)[1:])
def test_tokens_added_by_the_config_file_alone_are_known(tmp_path: Path, file: str, flags: dict[str, bool]) -> None:
    library = LibraryTokenizer.from_str(file)
    listed = {"<tool>": library.token_to_id("<tool>"), "<|end|>": library.get_vocab_size()}
    decoder = {str(token_id): added(name, **flags) for name, token_id in listed.items()}
    compare(model(tmp_path, file, {"added_tokens_decoder": decoder}))


def test_special_names_in_the_older_file_count_as_in_transformers(tmp_path: Path) -> None:
    folder = model(tmp_path, FILES["metaspace first"], {"bos_token": "h", "eos_token": None})
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": added("</s>"), "eos_token": "<s>"}))
    compare(folder)
    model(folder, FILES["metaspace first"], {"added_tokens_decoder": {"1": added("<s>")}})
    compare(folder)
    assert read_config(folder, None)["bos_token"] == "<s>"
    (tmp_path / "mine.json").write_text(json.dumps({"bos_token": "<unk>"}))
    mine = read_config(folder, tmp_path / "mine.json")
    assert (mine["bos_token"], mine["eos_token"], mine.get("chat_template")) == ("<unk>", "<s>", None)


def test_no_token_gets_an_id_that_no_file_names(tmp_path: Path) -> None:
    folder = model(tmp_path, tiny_tokenizer(), {"pad_token": "[PAD]", "added_tokens_decoder": {"9999": added("<far>")}})
    tokenizer = Tokenizer.load(folder, read_config(folder, None), 1)
    assert (tokenizer.token_id("[PAD]"), tokenizer.token_id("<far>")) == (None, None)
    tokenizer.close()


@pytest.mark.parametrize("decoder", [[], ["x"], {"one": added("<a>")}, {"1": "<a>"}, {"1": {"content": 3}}])
def test_added_tokens_that_cannot_be_read_stop_the_start(tmp_path: Path, decoder: Any) -> None:
    folder = model(tmp_path, tiny_tokenizer(), {"added_tokens_decoder": decoder})
    if not decoder:
        Tokenizer.load(folder, read_config(folder, None), 1).close()
        return
    with pytest.raises(StartupError, match=r"`added_tokens_decoder`"):
        Tokenizer.load(folder, read_config(folder, None), 1)
