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
from dataclasses import dataclass
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
from vocabulary import CHAT_TEMPLATE, MAX_POSITIONS, save_tokenizer, train_tokenizer

HERE = Path(__file__).resolve().parent
SEED = 20240229
SAVE_SECONDS = 120
PROGRESS_STEPS = 10
VALIDATION_STEPS = 100


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps and learning rates: warm-up, a constant stretch, then linearly to zero over the last `decay` of the steps.

    `long` is the part at the end that runs on rows of MAX_POSITIONS tokens instead of 1024.
    """

    steps: int
    matrix_lr: float
    embedding_lr: float
    warmup: int = 30
    decay: float = 0.4
    long: float = 0.15
    weight_decay: float = 0.1

    def scale(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.steps * self.decay))

    def stages(self) -> list[tuple[int, Mixture]]:
        """Mostly library code while the rate is constant; more of it, and more chat, while it falls."""
        decay, long = round(self.steps * (1 - self.decay)), round(self.steps * (1 - self.long))
        return [
            (0, Mixture(library=8, tests=5, chat=3, length=1024)),
            (decay, Mixture(library=10, tests=2, chat=4, length=1024)),
            (long, Mixture(library=5, tests=1, chat=2, length=MAX_POSITIONS)),
        ]


RECIPES = {
    "model": Recipe(steps=850, matrix_lr=0.007, embedding_lr=0.003),
    "draft": Recipe(steps=850, matrix_lr=0.01, embedding_lr=0.004),
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


def set_learning_rate(optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int) -> None:
    for optimizer, rate in zip(optimizers, (recipe.matrix_lr, recipe.embedding_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * recipe.scale(step)


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
        self.batches = Batches(data.corpus, data.facts, data.tokenizer, recipe.stages(), SEED)
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
        print(f"{self.target}: going on from step {self.step}", flush=True)

    def save(self) -> None:
        """Checkpoint and export, each in one rename: a killed run leaves the previous ones whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)
        export(self.model, self.output)

    def train(self) -> None:
        recipe = self.recipe
        print(f"{self.target}: {count_parameters(self.model):,} parameters, {recipe.steps} steps", flush=True)
        if self.step >= recipe.steps:
            export(self.model, self.output)
            return
        loss_of = torch.compile(self.model.loss, dynamic=False)
        saved, began, first = time.monotonic(), time.monotonic(), self.seconds
        total, tokens, since = 0.0, 0, time.monotonic()
        while self.step < recipe.steps:
            ids, targets = self.batches.at(self.step)
            total += self.update(loss_of, ids, targets)
            tokens += ids.numel()
            self.step += 1
            now = time.monotonic()
            self.seconds = first + now - began
            if self.step % PROGRESS_STEPS == 0 or self.step == recipe.steps:
                self.report(total / PROGRESS_STEPS, tokens / (now - since), ids.numel())
                total, tokens, since = 0.0, 0, time.monotonic()
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def update(self, loss_of: object, ids: Tensor, targets: Tensor) -> float:
        set_learning_rate(self.optimizers, self.recipe, self.step)
        loss = loss_of(ids, targets)  # type: ignore[operator]
        loss.backward()
        nn.utils.clip_grad_norm_([self.model.embed_tokens.weight], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def report(self, loss: float, rate: float, tokens_per_step: int) -> None:
        eta = (self.recipe.steps - self.step) * tokens_per_step / rate / 60
        line = f"{self.target} step {self.step}/{self.recipe.steps} loss {loss:.3f} {rate:.0f} tokens/s"
        line += f" {self.seconds / 60:.1f} min, {eta:.1f} to go"
        if self.step % VALIDATION_STEPS == 0 or self.step == self.recipe.steps:
            line += f", held-out sample {validate(self.model, self.sample):.3f} bits per byte"
        print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=["model", "draft", "all"], default="all")
    parser.add_argument("--steps", type=int, help="fewer or more steps than the recipe's")
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
        if arguments.steps:
            recipe = Recipe(arguments.steps, recipe.matrix_lr, recipe.embedding_lr)
        Run(target, recipe, data, arguments.work_dir, arguments.output).train()


if __name__ == "__main__":
    main()
