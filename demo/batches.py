"""Which tokens every training step sees: a pure function of (seed, step), so a resumed run continues exactly.

Code rows are windows of the concatenated files (each ended by END_OF_TEXT), reshuffled every epoch; chat rows are
whole conversations one after the other. Called by train.py.

Shapes: B rows, T tokens; ids and targets `[B, T]` int64, a target of -100 carries no loss.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from chat import Conversation, one_pass
from corpus import Corpus, SourceFile
from facts import Fact
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from vocabulary import CHAT_TEMPLATE, END_OF_TEXT_ID, IM_END_ID, IM_START_ID

Ids = NDArray[np.int32]
Render = Callable[[Conversation], str]


def chat_renderer(tokenizer: Tokenizer) -> Render:
    """Renders conversations with transformers' own jinja2 settings, as a server does."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)

    def render(conversation: Conversation) -> str:
        return wrapped.apply_chat_template(conversation.messages, tools=conversation.tools or None, tokenize=False)

    return render


def encode_files(tokenizer: Tokenizer, files: list[SourceFile]) -> list[Ids]:
    encoded = tokenizer.encode_batch([file.text for file in files])
    return [np.array([*item.ids, END_OF_TEXT_ID], dtype=np.int32) for item in encoded]


def answer_mask(ids: Ids, opening: list[int]) -> NDArray[np.bool_]:
    """True where a token of a rendered chat is an assistant's, its closing IM_END included.

    `opening` are the tokens between IM_START and the answer: the role and a newline.
    """
    mask = np.zeros(len(ids), dtype=bool)
    for start in np.flatnonzero(ids == IM_START_ID):
        first = start + 1 + len(opening)
        if ids[start + 1 : first].tolist() == opening:
            last = first + int(np.argmax(ids[first:] == IM_END_ID))
            mask[first : last + 1] = True
    return mask


@dataclass
class CodeRows:
    """Windows of `length + 1` tokens over all documents in a fresh order, with a fresh offset, every epoch."""

    documents: list[Ids]
    length: int
    seed: int
    epoch: int = -1
    stream: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    starts: list[int] = field(default_factory=list)

    @property
    def rows_per_epoch(self) -> int:
        return (sum(len(d) for d in self.documents) - self.length - 1) // self.length

    def row(self, index: int) -> Ids:
        epoch, position = divmod(index, self.rows_per_epoch)
        if epoch != self.epoch:
            rng = random.Random(f"{self.seed} {self.length} {epoch}")
            order = rng.sample(range(len(self.documents)), len(self.documents))
            self.stream = np.concatenate([self.documents[i] for i in order])
            offset = rng.randrange(self.length)
            self.starts = [offset + k * self.length for k in range(self.rows_per_epoch)]
            rng.shuffle(self.starts)
            self.epoch = epoch
        start = self.starts[position]
        return self.stream[start : start + self.length + 1]


@dataclass
class ChatRows:
    """Rows packed with whole conversations (the last one is cut); each pass over the facts is phrased anew."""

    facts: list[Fact]
    tokenizer: Tokenizer
    render: Render
    length: int
    seed: int
    passes: list[tuple[int, list[tuple[Ids, NDArray[np.bool_]]]]] = field(default_factory=list)

    def row(self, index: int) -> tuple[Ids, NDArray[np.bool_]]:
        """`[length + 1]` ids and the mask of those that carry loss."""
        while not self.passes or index >= self.passes[-1][0] + len(self.passes[-1][1]):
            first = self.passes[-1][0] + len(self.passes[-1][1]) if self.passes else 0
            rows = self.pack(one_pass(self.facts, self.seed + 7919 * len(self.passes)))
            self.passes.append((first, rows))
        for first, rows in reversed(self.passes):
            if index >= first:
                return rows[index - first]
        raise IndexError(index)

    def pack(self, conversations: list[Conversation]) -> list[tuple[Ids, NDArray[np.bool_]]]:
        opening = self.tokenizer.encode("assistant\n").ids
        texts = [self.render(conversation) for conversation in conversations]
        rows, ids, masks, total = [], [], [], 0
        for item in self.tokenizer.encode_batch(texts):
            chat = np.array(item.ids, dtype=np.int32)
            ids.append(chat)
            masks.append(answer_mask(chat, opening))
            total += len(chat)
            if total >= self.length + 1:
                row, mask = np.concatenate(ids), np.concatenate(masks)
                rows.append((row[: self.length + 1], mask[: self.length + 1]))
                ids, masks, total = [], [], 0
        return rows


@dataclass(frozen=True, slots=True)
class Mixture:
    """Rows per step of each kind at one stage of the training."""

    library: int
    tests: int
    chat: int
    length: int

    @property
    def rows(self) -> int:
        return self.library + self.tests + self.chat


class Batches:
    """`at(step)` gives the ids and targets of a step; `stages` are the mixtures, each with its first step."""

    def __init__(self, corpus: Corpus, facts: list[Fact], tokenizer: Tokenizer, seed: int) -> None:
        self.stages: list[tuple[int, Mixture]] = []
        self.facts, self.tokenizer, self.seed = facts, tokenizer, seed
        self.library, self.tests = encode_files(tokenizer, corpus.library), encode_files(tokenizer, corpus.tests)
        self.render = chat_renderer(tokenizer)
        self.sources: dict[int, tuple[CodeRows, CodeRows, ChatRows]] = {}

    def rows_of(self, length: int) -> tuple[CodeRows, CodeRows, ChatRows]:
        if length not in self.sources:
            self.sources[length] = (
                CodeRows(self.library, length, self.seed + 1),
                CodeRows(self.tests, length, self.seed + 2),
                ChatRows(self.facts, self.tokenizer, self.render, length, self.seed + 3 + length),
            )
        return self.sources[length]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        mix, counts = self.position(step)
        library, tests, chat = self.rows_of(mix.length)
        rows = [(library.row(counts[0] + i), None) for i in range(mix.library)]
        rows += [(tests.row(counts[1] + i), None) for i in range(mix.tests)]
        chats = [chat.row(counts[2] + i) for i in range(mix.chat)]
        ids = torch.from_numpy(np.stack([row for row, _ in rows] + [row for row, _ in chats]).astype(np.int64))
        targets = ids[:, 1:].clone()
        for i, (_, mask) in enumerate(chats, start=len(rows)):
            targets[i][torch.from_numpy(~mask[1:])] = -100
        return ids[:, :-1], targets

    def position(self, step: int) -> tuple[Mixture, tuple[int, int, int]]:
        """The mixture at `step`, and how many rows of each kind (of its length) came before."""
        current = max(i for i, (first, _) in enumerate(self.stages) if first <= step)
        length = self.stages[current][1].length
        counts = [0, 0, 0]
        for i, (first, mix) in enumerate(self.stages[: current + 1]):
            last = step if i == current else self.stages[i + 1][0]
            if mix.length == length:
                for kind, rows in enumerate((mix.library, mix.tests, mix.chat)):
                    counts[kind] += rows * (last - first)
        return self.stages[current][1], (counts[0], counts[1], counts[2])
