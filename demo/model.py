"""The Llama decoder that is trained, its optimizer, and its export in the Hugging Face layout.

A lean twin of transformers' LlamaForCausalLM (same formulas, checked by demo/tests): fp32 weights, bf16 matrix
products, and no work for what training does not need. Called by train.py and evaluate.py.

Shapes: B rows, T tokens, E hidden, H query heads, K kv heads, D head dim, F ffn, V vocabulary.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vocabulary import END_OF_TEXT_ID, IM_END_ID, MAX_POSITIONS, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    vocab: int = VOCAB_SIZE
    max_positions: int = MAX_POSITIONS

    @property
    def init_std(self) -> float:
        return 0.02


# Every width is a multiple of 64 and splits in two, every depth of the model too. Smaller than 12 M parameters on
# purpose: for the tokens two cores can process in an hour this size reaches a lower loss than the full 12 M.
SHAPES = {
    "model": Shape(hidden=384, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=1024),
    "draft": Shape(hidden=128, layers=3, heads=2, kv_heads=2, head_dim=64, ffn=512),
}


def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, D/2]` in fp32."""
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.arange(length).float()[:, None] * inverse[None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotary embedding on `[B, T, heads, D]`: the two halves of D are the two coordinates."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(torch.bfloat16)


class Linear(nn.Linear):
    """fp32 weight, bf16 product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(torch.bfloat16))


class Layer(nn.Module):
    """Pre-norm attention and gated MLP; submodule names are Hugging Face's, so a state dict is the checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        self.input_layernorm = Norm(s.hidden, s.norm_eps)
        self.post_attention_layernorm = Norm(s.hidden, s.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": Linear(s.hidden, s.heads * s.head_dim),
                "k_proj": Linear(s.hidden, s.kv_heads * s.head_dim),
                "v_proj": Linear(s.hidden, s.kv_heads * s.head_dim),
                "o_proj": Linear(s.heads * s.head_dim, s.hidden),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": Linear(s.hidden, s.ffn),
                "up_proj": Linear(s.hidden, s.ffn),
                "down_proj": Linear(s.ffn, s.hidden),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), cos, sin)
        y = self.post_attention_layernorm(x)
        mlp = self.mlp
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))

    def attention(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, attn = self.shape, self.self_attn
        rows, length, _ = y.shape
        q = rotate(attn["q_proj"](y).view(rows, length, s.heads, s.head_dim), cos, sin)
        k = rotate(attn["k_proj"](y).view(rows, length, s.kv_heads, s.head_dim), cos, sin)
        v = attn["v_proj"](y).view(rows, length, s.kv_heads, s.head_dim)
        group = s.heads // s.kv_heads
        k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))  # [B, H, T, D]
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return attn["o_proj"](mixed.transpose(1, 2).reshape(rows, length, s.heads * s.head_dim))


class Decoder(nn.Module):
    """`forward` returns final hidden states `[B, T, E]` in bf16; `logits` and `loss` finish the job."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.norm_eps)
        cos, sin = rope_tables(shape, shape.max_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset(shape)

    def reset(self, shape: Shape) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim != 2:
                continue
            scale = (2 * shape.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            std = shape.init_std if "embed" in name else 0.5 * weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std * scale)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = F.embedding(ids, self.embed_tokens.weight).to(torch.bfloat16)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight.to(torch.bfloat16)).float()

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets `[B, T]` that are not -100."""
        logits = self.logits(self(ids).flatten(0, 1))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100)


def count_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al., 2024): `[n, m]` towards its nearest semi-orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.T.contiguous() if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; for weight matrices only, scaled to match AdamW's step size."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(buffer, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def hf_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": [IM_END_ID, END_OF_TEXT_ID],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": shape.init_std,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": END_OF_TEXT_ID,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def export(model: Decoder, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bf16); each replaced in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {
        "do_sample": False,
        "eos_token_id": [IM_END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
    }
    for name, content in (("config.json", hf_config(model.shape)), ("generation_config.json", generation)):
        replace_text(folder / name, json.dumps(content, indent=2) + "\n")
    tensors = {f"model.{name}": weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    partial = folder / ".model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, folder / "model.safetensors")


def load_exported(shape: Shape, folder: Path) -> Decoder:
    model = Decoder(shape)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return model


def replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
