"""The streaming APIs that the load generator speaks, and how the events of a stream are counted cheaply.

Owns request bodies and the reading of server-sent events. It does not connect (client.py) or compute statistics
(measure.py). An event is parsed as JSON only until the first text has come and when it may carry the token counts:
the generator shares its CPU with the server it measures.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 = greedy."""

    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False  # only for servers whose OpenAI routes have the field

    def tgi(self) -> Json:
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "seed": self.seed}

    def openai(self) -> Json:
        fields: Json = {"temperature": self.temperature}
        if self.seed is not None:
            fields["seed"] = self.seed
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return fields


def _tgi_body(model: str, prompt: str, output_tokens: int, sampling: Sampling) -> Json:
    return {"inputs": prompt, "parameters": {"max_new_tokens": output_tokens, "details": True, **sampling.tgi()}}


def _completion_body(model: str, prompt: str, output_tokens: int, sampling: Sampling) -> Json:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling.openai(),
    }


def _chat_body(model: str, prompt: str, output_tokens: int, sampling: Sampling) -> Json:
    body = _completion_body(model, prompt, output_tokens, sampling)
    del body["prompt"]
    return {**body, "messages": [{"role": "user", "content": prompt}]}


def _tgi_counts(event: Json) -> tuple[int, int] | None:
    details = event.get("details")
    return (details["input_length"], details["generated_tokens"]) if details else None


def _openai_counts(event: Json) -> tuple[int, int] | None:
    usage = event.get("usage")
    return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None


def _openai_text(event: Json) -> bool:
    return any(c.get("text") or c.get("delta", {}).get("content") for c in event.get("choices", ()))


@dataclass(frozen=True, slots=True)
class Api:
    """One streaming route."""

    path: str
    body: Callable[[str, str, int, Sampling], Json]  # (model, prompt, output_tokens, sampling)
    has_token: Callable[[Json], bool]  # whether an event carries a token
    counts: Callable[[Json], tuple[int, int] | None]  # (prompt tokens, output tokens), when an event carries them
    counts_marker: bytes  # an event without these bytes carries no counts
    end_marker: bytes  # the stream is complete once an event contains these bytes


APIS: dict[str, Api] = {
    "tgi": Api("/generate_stream", _tgi_body, lambda e: "token" in e, _tgi_counts, b'"details":{', b'"details":{'),
    "completions": Api(
        "/v1/completions", _completion_body, _openai_text, _openai_counts, b'"completion_tokens":', b"[DONE]"
    ),
    "chat": Api("/v1/chat/completions", _chat_body, _openai_text, _openai_counts, b'"completion_tokens":', b"[DONE]"),
}


@dataclass(slots=True)
class Stream:
    """What one stream has delivered so far. Times are seconds of one clock."""

    api: Api
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between tokens; 0 when they came together
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    complete: bool = False
    _rest: bytes = b""

    def feed(self, chunk: bytes, now_s: float) -> None:
        """Takes bytes as they came from the socket at `now_s`."""
        *events, self._rest = (self._rest + chunk.replace(b"\r", b"")).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._event(event[5:].lstrip(), now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        if data.startswith(b'{"error"'):
            self.error = _error_kind(json.loads(data))
            return
        if self.api.end_marker in data:
            self.complete = True
        if data == b"[DONE]":
            return
        if self.api.counts_marker in data and (counts := self.api.counts(json.loads(data))):
            self.prompt_tokens, self.output_tokens = counts
            if b'"choices":[]' in data:
                return  # OpenAI's extra event with the usage alone
        if self.first_s is None:
            if self.api.has_token(json.loads(data)):
                self.first_s = self.last_s = now_s
            return
        self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s

    def close(self) -> None:
        """The connection has ended: settle the counts and find out whether something is missing."""
        if self.error is None and not self.complete:
            self.error = "truncated stream"
        if self.output_tokens == 0:
            self.output_tokens = len(self.gaps_s) + (self.first_s is not None)
        del self.gaps_s[max(0, self.output_tokens - 1) :]  # an OpenAI stream may end with events that carry no token


def _error_kind(event: Json) -> str:
    """A short name for an error event or body, TGI's or OpenAI's."""
    error = event.get("error")
    if isinstance(error, dict):
        return str(error.get("type") or error.get("http_status_code") or error.get("message"))
    return str(event.get("error_type") or error)
