"""The vocabulary as llguidance sees it: with every kind of tokenizer, what it spells is what tokens decode to."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tgi_proto.grammar import first_line, load_tokenizer, make_matcher
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "a b  c",
    "héllo wörld",
    "日本語 😀👩‍👩‍👧 z",
    "\ttab\nline\r\n",
    '{"a": [1, 2]}',
    "\x00\x7f\u0301\u202e\U0010ffff",
]
CORPUS = ["hello world, this is a text about nothing " * 3, "日本語 text 😀", '{"key": [1, 2, 3], "other": null}'] * 5


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: tokens are bytes in disguise."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral, Gemma: tokens are text, a space is ▁, other characters fall back to bytes."""
    vocabulary = {"</s>": 0, "<unk>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz", *"日本é", "▁t", "▁te", "he", "ll", "hell", "▁a"]:
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("▁t", "e"), ("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    return tokenizer


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("choose", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("text", TEXTS)
def test_what_a_grammar_spells_is_what_the_tokens_decode_to(
    tmp_path: Path, kind: Callable[[], Tokenizer], choose: int, text: str
) -> None:
    library = kind()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, library.get_vocab_size() + 9, [0])  # a head wider than the vocabulary
    regex = "".join(f"\\u{{{ord(character):x}}}" for character in text)
    matcher = make_matcher(tokenizer, f'{{"grammars":[{{"lark_grammar":"start: /{regex}/"}}]}}'.replace("\\", "\\\\"))

    tokens = []
    while len(tokens) < 200:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(len(mask) * 8) if mask[token >> 3] >> (token & 7) & 1]
        assert allowed, first_line(matcher.get_error())
        if allowed == [0]:
            break
        tokens.append(allowed[choose])
        assert matcher.consume_token(tokens[-1])

    assert library.decode(tokens, skip_special_tokens=False) == text
    assert max(tokens) < library.get_vocab_size()


def test_nobody_imports_llguidance_before_the_first_grammar() -> None:
    code = "import sys, tgi_router.cli, tgi_shard.start, tgi_shard.server; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
