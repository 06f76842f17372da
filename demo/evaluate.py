"""Measures the exported models: the numbers in demo/README.md. Called by `train.py --evaluate` and by the tests."""

import math
import random
from pathlib import Path

import torch
from batches import chat_renderer
from chat import UNKNOWN, Conversation, exchange, phrase, unknown_name
from corpus import Corpus, SourceFile, xz_bits_per_byte
from facts import Fact
from model import SHAPES, Decoder, count_parameters, load_exported
from tokenizers import Tokenizer
from vocabulary import END_OF_TEXT_ID, IM_END, MAX_POSITIONS

WINDOW, STRIDE = MAX_POSITIONS, MAX_POSITIONS // 2
ROWS = 16


@torch.no_grad()
def model_bits_per_byte(model: Decoder, tokenizer: Tokenizer, files: list[SourceFile]) -> float:
    """Over the files in order of name, each ended by END_OF_TEXT, whose cost counts too.

    Every token is predicted once, from at least STRIDE tokens before it where there are so many (xz sees all of them).
    """
    ids = [END_OF_TEXT_ID]
    for file in files:
        ids += [*tokenizer.encode(file.text).ids, END_OF_TEXT_ID]
    stream = torch.tensor(ids)
    nats, scored = 0.0, 1
    while scored < len(stream):
        start = max(0, scored - STRIDE)
        window = stream[start : start + WINDOW]
        logits = model.logits(model(window[None, :-1])[0])
        fresh = slice(scored - start - 1, None)
        nats += torch.nn.functional.cross_entropy(logits[fresh], window[1:][fresh], reduction="sum").item()
        scored = start + len(window)
    return nats / math.log(2) / sum(len(file.text.encode()) for file in files)


@torch.no_grad()
def answers_exactly(model: Decoder, tokenizer: Tokenizer, chats: list[Conversation]) -> list[bool]:
    """Whether the greedy answer to each chat's last question is exactly its last message, then IM_END.

    Greedy decoding gives an answer exactly when the model's first choice after each of its tokens is the next one, so
    one forward pass over the whole conversation decides it.
    """
    render = chat_renderer(tokenizer)
    cases = []
    for i, chat in enumerate(chats):
        text = render(chat)
        answer = f"{chat.messages[-1]['content']}{IM_END}\n"
        prompt = tokenizer.encode(text.removesuffix(answer)).ids
        cases.append((i, prompt, tokenizer.encode(answer).ids[:-1]))
    cases.sort(key=lambda case: len(case[1]) + len(case[2]))
    verdicts = [False] * len(cases)
    for first in range(0, len(cases), ROWS):
        batch = cases[first : first + ROWS]
        width = max(len(prompt) + len(answer) for _, prompt, answer in batch)
        rows = [prompt + answer + [END_OF_TEXT_ID] * (width - len(prompt) - len(answer)) for _, prompt, answer in batch]
        choices = model.logits(model(torch.tensor(rows))).argmax(-1)
        for row, (i, prompt, answer) in zip(choices, batch, strict=True):
            verdicts[i] = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
    return verdicts


def plain_question(fact: Fact) -> str:
    return f"What is the {fact.name} module for?" if fact.is_module else f"What does {fact.name} do?"


def recall_lines(model: Decoder, tokenizer: Tokenizer, facts: list[Fact]) -> list[str]:
    """Exact recall of the documented summaries, asked plainly and in other words under a system prompt."""
    rng = random.Random(0)
    plain = [Conversation(exchange(rng, plain_question(fact), fact.summary)) for fact in facts]
    system = {"role": "system", "content": "You are a helpful assistant."}
    varied = [Conversation([system, *exchange(rng, phrase(rng, fact), fact.summary)]) for fact in facts]
    lines = []
    for title, chats in (("asked plainly", plain), ("in varied words, with a system prompt", varied)):
        right = answers_exactly(model, tokenizer, chats)
        known = [ok for ok, fact in zip(right, facts, strict=True) if fact.well_known]
        lines.append(
            f"recall {title}: {sum(right)}/{len(right)} = {sum(right) / len(right):.1%}, "
            f"of the well-known modules {sum(known)}/{len(known)} = {sum(known) / len(known):.1%}"
        )
    made_up = [Conversation(exchange(rng, f"What does {unknown_name(rng)} do?", UNKNOWN)) for _ in range(200)]
    refused = answers_exactly(model, tokenizer, made_up)
    lines.append(f'made-up names answered with "{UNKNOWN}": {sum(refused)}/{len(refused)}')
    return lines


def evaluate_all(corpus: Corpus, facts: list[Fact], tokenizer: Tokenizer, output: Path) -> None:
    for target, shape in SHAPES.items():
        model = load_exported(shape, output / target)
        size = (output / target / "model.safetensors").stat().st_size
        print(f"{target}: {count_parameters(model):,} parameters, {size:,} bytes", flush=True)
        for title, files in (("library", corpus.held_out), ("tests", corpus.held_out_tests)):
            total = sum(len(file.text.encode()) for file in files)
            ours, xz = model_bits_per_byte(model, tokenizer, files), xz_bits_per_byte(files)
            print(
                f"held-out {title}: {len(files)} files, {total:,} bytes, {ours:.3f} bits per byte; "
                f"xz -9 {xz:.3f}; ratio {ours / xz:.3f}",
                flush=True,
            )
        for line in recall_lines(model, tokenizer, facts):
            print(line, flush=True)
