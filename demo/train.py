"""Trains the demo model and its draft model from the running Python's standard library; needs no network.

    python demo/train.py                  # both models, resumable: run it again to go on
    python demo/train.py --target draft   # one of them
    python demo/train.py --evaluate       # the numbers of demo/README.md

Owns the schedule and the training loop. The data is in corpus.py, facts.py, chat.py and batches.py, the tokenizer in
vocabulary.py, the network in model.py, the measuring in evaluate.py.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not spin on shared cores

import torch
from batches import Batches, Mixture, chat_renderer
from chat import one_pass
from corpus import Corpus, build_corpus
from facts import Fact, build_facts
from model import SHAPES, Decoder, Muon, count_parameters, export
from tokenizers import Tokenizer
from torch import Tensor, nn
from vocabulary import MAX_POSITIONS, save_tokenizer, train_tokenizer

HERE = Path(__file__).resolve().parent
SEED = 20240229
SAVE_SECONDS = 120
PROGRESS_STEPS = 10
VALIDATION_STEPS = 100


# What each part of the training sees: from which progress on, and the mixture. Steps and rows are small first, as
# progress goes with steps more than with tokens early on; then come more chat and fewer tests, then longer rows.
STAGES = [
    (0.0, Mixture(library=10, tests=4, chat=2, length=256)),
    (0.12, Mixture(library=5, tests=3, chat=4, length=512)),
    (0.45, Mixture(library=6, tests=1, chat=5, length=512)),
    (0.8, Mixture(library=3, tests=0, chat=3, length=1024)),
    (0.92, Mixture(library=2, tests=0, chat=1, length=MAX_POSITIONS)),
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast: the learning rates warm up, stay until progress `constant`, then fall linearly to zero.

    Progress is the part of the steps done, or of the minutes where those run out first: on a slow or busy machine the
    training then has fewer steps, but ends in time and with its whole schedule.
    """

    steps: int
    minutes: float
    matrix_lr: float
    embedding_lr: float
    warmup: int = 30
    constant: float = 0.2
    weight_decay: float = 0.1

    def progress(self, step: int, seconds: float) -> float:
        return max(step / self.steps, seconds / 60 / self.minutes)

    def scale(self, step: int, progress: float) -> float:
        return min(1.0, (step + 1) / self.warmup, (1 - progress) / (1 - self.constant))


RECIPES = {
    "model": Recipe(steps=3600, minutes=75, matrix_lr=0.007, embedding_lr=0.003),
    "draft": Recipe(steps=1800, minutes=12, matrix_lr=0.01, embedding_lr=0.004),
}


@dataclass(slots=True)
class Data:
    corpus: Corpus
    facts: list[Fact]
    tokenizer: Tokenizer


def prepare(output: Path) -> Data:
    """Corpus, facts and the tokenizer: the one already exported, or else a new one."""
    corpus = build_corpus()
    facts = build_facts(corpus)
    path = output / "model" / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = train_tokenizer(tokenizer_texts(corpus, facts))
        for target in SHAPES:
            save_tokenizer(tokenizer, output / target)
    return Data(corpus, facts, tokenizer)


def tokenizer_texts(corpus: Corpus, facts: list[Fact]) -> Iterable[str]:
    for file in corpus.library + corpus.tests:
        yield file.text
    render = chat_renderer(Tokenizer.from_str(_EMPTY_TOKENIZER))
    for conversation in one_pass(facts, SEED):
        yield render(conversation)


_EMPTY_TOKENIZER = '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}'


def build_optimizers(model: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    embedding = model.embed_tokens.weight
    matrices = [w for w in model.parameters() if w.ndim == 2 and w is not embedding]
    norms = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": [embedding]}, {"params": norms}]
    return [
        Muon(matrices, lr=recipe.matrix_lr, momentum=0.95, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(groups, lr=recipe.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], recipe: Recipe, scale: float) -> None:
    for optimizer, rate in zip(optimizers, (recipe.matrix_lr, recipe.embedding_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * scale


def validation_sample(data: Data) -> tuple[Tensor, float]:
    """A dozen windows `[12, 1025]` of held-out code and their bytes per token; for the progress lines only."""
    ids = [token for file in data.corpus.held_out for token in data.tokenizer.encode(file.text).ids]
    starts = range(0, len(ids) - 1025, len(ids) // 12)
    windows = torch.tensor([ids[start : start + 1025] for start in starts][:12])
    size = sum(len(data.tokenizer.decode(row[1:].tolist()).encode()) for row in windows)
    return windows, size / windows[:, 1:].numel()


@torch.no_grad()
def validate(model: Decoder, sample: tuple[Tensor, float]) -> float:
    """Bits per byte on the validation sample."""
    windows, bytes_per_token = sample
    losses = [model.loss(row[None, :-1], row[None, 1:]).item() for row in windows]
    return sum(losses) / len(losses) / math.log(2) / bytes_per_token


class Run:
    """One training run and its checkpoint; everything a resumed run needs is in the checkpoint and the step number."""

    def __init__(self, target: str, recipe: Recipe, data: Data, work: Path, output: Path) -> None:
        torch.manual_seed(SEED)
        self.target, self.recipe, self.output = target, recipe, output / target
        self.model = Decoder(SHAPES[target])
        self.optimizers = build_optimizers(self.model, recipe)
        self.batches = Batches(data.corpus, data.facts, data.tokenizer, SEED)
        self.sample = validation_sample(data)
        self.checkpoint = work / f"{target}.pt"
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.batches.stages = [(first, STAGES[i][1]) for i, first in enumerate(state["stage_starts"])]
        print(f"{self.target}: going on from step {self.step}", flush=True)

    def save(self) -> None:
        """Checkpoint and export, each in one rename: a killed run leaves the previous ones whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "stage_starts": [first for first, _ in self.batches.stages],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)
        export(self.model, self.output)

    def train(self) -> None:
        recipe = self.recipe
        print(f"{self.target}: {count_parameters(self.model):,} parameters, {recipe.steps} steps", flush=True)
        loss_of = torch.compile(self.model.loss, dynamic=False)
        saved, began, first = time.monotonic(), time.monotonic(), self.seconds
        total, tokens, count, since = 0.0, 0, 0, time.monotonic()
        while self.progress < 1:
            self.enter_stages()
            ids, targets = self.batches.at(self.step)
            total += self.update(loss_of, ids, targets)
            tokens += ids.numel()
            self.step, count = self.step + 1, count + 1
            now = time.monotonic()
            self.seconds = first + now - began
            if self.step % PROGRESS_STEPS == 0 or self.progress >= 1:
                self.report(total / count, tokens / (now - since), (now - since) / count)
                total, tokens, count, since = 0.0, 0, 0, time.monotonic()
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    @property
    def progress(self) -> float:
        return self.recipe.progress(self.step, self.seconds)

    def enter_stages(self) -> None:
        while len(self.batches.stages) < len(STAGES) and self.progress >= STAGES[len(self.batches.stages)][0]:
            mixture = STAGES[len(self.batches.stages)][1]
            self.batches.stages.append((self.step, mixture))
            print(f"{self.target}: from step {self.step} on {mixture}", flush=True)

    def update(self, loss_of: object, ids: Tensor, targets: Tensor) -> float:
        set_learning_rate(self.optimizers, self.recipe, self.recipe.scale(self.step, self.progress))
        loss = loss_of(ids, targets)  # type: ignore[operator]
        loss.backward()
        nn.utils.clip_grad_norm_([self.model.embed_tokens.weight], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def report(self, loss: float, tokens_per_second: float, seconds_per_step: float) -> None:
        recipe = self.recipe
        eta = min((recipe.steps - self.step) * seconds_per_step / 60, recipe.minutes - self.seconds / 60)
        line = f"{self.target} step {self.step}/{recipe.steps} loss {loss:.3f} {tokens_per_second:.0f} tokens/s"
        line += f" {self.seconds / 60:.1f} min, {max(eta, 0):.1f} to go"
        if self.step % VALIDATION_STEPS == 0 or self.progress >= 1:
            line += f", held-out sample {validate(self.model, self.sample):.3f} bits per byte"
        print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=["model", "draft", "all"], default="all")
    parser.add_argument("--steps", type=int, help="at most so many steps instead of the recipe's")
    parser.add_argument("--minutes", type=float, help="at most so many minutes instead of the recipe's")
    parser.add_argument("--work-dir", type=Path, default=HERE / ".work", help="checkpoints (default: demo/.work)")
    parser.add_argument("--output", type=Path, default=HERE / "tgi_demo", help="where the models go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", action="store_true", help="measure the exported models instead of training")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    data = prepare(arguments.output)
    if arguments.evaluate:
        from evaluate import evaluate_all

        evaluate_all(data.corpus, data.facts, data.tokenizer, arguments.output)
        return
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    for target in ("model", "draft") if arguments.target == "all" else (arguments.target,):
        recipe = RECIPES[target]
        steps, minutes = arguments.steps or recipe.steps, arguments.minutes or recipe.minutes
        recipe = replace(recipe, steps=steps, minutes=minutes)
        Run(target, recipe, data, arguments.work_dir, arguments.output).train()


if __name__ == "__main__":
    main()
