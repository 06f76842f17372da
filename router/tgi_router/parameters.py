"""THE table of sampling parameters: one row (one field of `GenerateParameters`) for each.

A row says the name on TGI's routes, the type, the rule with TGI's exact sentence, the name on OpenAI's routes, and the
field of the proto's SamplingParameters it travels in. Request structs (schemas/), validation, the wire message and the
served documentation derive from it: to add a parameter, add a row here and a field in generate.proto.

Rows stand in TGI's order of checks, which decides what a request with two mistakes is told. Pure: no I/O, no clock.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta
from tgi_proto import generate_pb2 as pb

from .errors import ValidationError
from .grammars import GivenGrammar

U64_MAX = 2**64 - 1
_SMALLEST_TOP_P = 1e-6  # what OpenAI's clients mean by a `top_p` of 0: the most likely token
MAX_STOP_CHARS = 300  # a token may cost the square of it; TGI found no longer ones either
MAX_BIASES = 1024  # entries of `logit_bias`: the shards keep as many for every row
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
USIZE = Annotated[int, Meta(ge=0)]
ANY_SEED = Annotated[int, Meta(ge=-(2**63))]


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are validated against. Tokens, counts; named after the flags that set them."""

    max_input_tokens: int
    max_total_tokens: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    vocab_size: int  # the model's own: valid token ids are below it


Rule = Callable[[Any, "GenerateParameters", Limits], str | None]


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says about one parameter beside its name, type and default.

    rule: returns the sentence when the value is wrong; called only when a value was given.
    openai: the field's name on /v1/*, or None when it cannot be set there (or is derived in schemas/openai.py).
    openai_type: its type there, when that is wider; openai_reads: what a value there means here.
    proto: the field in pb.SamplingParameters; neutral: what is sent when no value was given (None: nothing).
    after_inputs: checked after the prompt was found not to be empty, as TGI does.
    """

    help: str
    rule: Rule | None = None
    openai: str | None = None
    openai_type: Any = None
    openai_reads: Callable[[Any], Any] | None = None
    proto: str | None = None
    neutral: float | int | bool | None = 0
    after_inputs: bool = False


def _unless(allowed: Callable[[Any], bool], sentence: str) -> Rule:
    """A rule that needs nothing but the value."""
    return lambda value, parameters, limits: None if allowed(value) else sentence


def _best_of(value: int, parameters: "GenerateParameters", limits: Limits) -> str | None:
    if value > 1 and limits.max_best_of == 1:
        return "`best_of` != 1 is not allowed for this endpoint. `--max-best-of` raises the limit"
    if value == 0 or value > limits.max_best_of:
        return f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {value}. `--max-best-of` raises the limit"
    if value > 1 and not parameters.asks_for_sampling:
        return "you must use sampling when `best_of` is > 1"
    return None


def _stop(value: list[str], parameters: "GenerateParameters", limits: Limits) -> str | None:
    if len(value) > limits.max_stop_sequences:
        limit = limits.max_stop_sequences
        return (
            f"`stop` supports up to {limit} stop sequences. Given: {len(value)}. "
            "`--max-stop-sequences` raises the limit"
        )
    if any(not stop for stop in value):
        return "`stop` must not contain an empty string"
    longest = max(map(len, value), default=0)
    if longest > MAX_STOP_CHARS:
        return f"`stop` sequences must have at most {MAX_STOP_CHARS} characters. Given: {longest}"
    return None


def _seed(value: int, parameters: "GenerateParameters", limits: Limits) -> str | None:
    if (parameters.best_of or 1) > 1:
        return "`seed` must not be set when `best_of` > 1"
    return None if value <= U64_MAX else f"`seed` must be <= {U64_MAX}. Given: {value}"


def _openai_seed(value: int) -> int | None:
    """OpenAI's seeds are signed; -1 asks for a random one, as with vLLM and llama.cpp."""
    return None if value == -1 else value & U64_MAX if value < 0 else value


def _logit_bias(value: dict[int, float], parameters: "GenerateParameters", limits: Limits) -> str | None:
    if len(value) > MAX_BIASES:
        return f"`logit_bias` must have at most {MAX_BIASES} entries. Given: {len(value)}"
    for token_id, bias in value.items():
        if not 0 <= token_id < limits.vocab_size:
            return f"`logit_bias` must name token ids >= 0 and < {limits.vocab_size}. Given: {token_id}"
        if not -100 <= bias <= 100:
            return f"`logit_bias` must be >= -100 and <= 100. Given: {bias} for token {token_id}"
    return None


def _min_new_tokens(value: int, parameters: "GenerateParameters", limits: Limits) -> str | None:
    most = parameters.max_new_tokens
    if most is None or value <= most:
        return None
    return f"`min_new_tokens` must be <= `max_new_tokens`. Given: {value} and {most}"


def _top_n_tokens(value: int, parameters: "GenerateParameters", limits: Limits) -> str | None:
    if value <= limits.max_top_n_tokens:
        return None
    limit = limits.max_top_n_tokens
    return f"`top_n_tokens` must be >= 0 and <= {limit}. Given: {value}. `--max-top-n-tokens` raises the limit"


def _truncate(value: int, parameters: "GenerateParameters", limits: Limits) -> str | None:
    if 0 < value <= limits.max_input_tokens:
        return None
    limit = limits.max_input_tokens
    return (
        f"`truncate` must be strictly positive and less than {limit}. Given: {value}. "
        "`--max-input-tokens` raises the limit"
    )


def _adapter_id(value: str, parameters: "GenerateParameters", limits: Limits) -> str | None:
    return f"`adapter_id` {value!r} is unknown: no adapters are loaded, and loading them is not built yet"


class GenerateParameters(msgspec.Struct, kw_only=True):
    """TGI's `parameters` object; None is absent on every field. Order: TGI's order of checks."""

    best_of: Annotated[
        USIZE | None,
        Row("Generate so many sequences and return the one with the highest mean log-probability.", _best_of),
    ] = None
    temperature: Annotated[
        float | None,
        Row(
            "The logits are divided by it before sampling.",
            _unless(lambda v: v > 0, "`temperature` must be strictly positive"),
            openai="temperature",
            proto="temperature",
            neutral=1.0,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Row(
            "Above 1, tokens of the prompt and the output become less likely. 1 = off.",
            _unless(lambda v: v > 0, "`repetition_penalty` must be strictly positive"),
            openai="repetition_penalty",
            proto="repetition_penalty",
            neutral=1.0,
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        Row(
            "Above 0, tokens become less likely the more often they were generated.",
            _unless(lambda v: -2 <= v <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
            openai="frequency_penalty",
            proto="frequency_penalty",
            neutral=0.0,
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        Row(
            "Above 0, tokens become less likely once they were generated.",
            _unless(lambda v: -2 <= v <= 2, "`presence_penalty` must be >= -2.0 and <= 2.0"),
            openai="presence_penalty",
            proto="presence_penalty",
            neutral=0.0,
        ),
    ] = None
    logit_bias: Annotated[
        dict[int, float] | None,
        Row(
            "Added to single tokens' logits: an object from token id to a number from -100 (never) to 100 (only this).",
            _logit_bias,
            openai="logit_bias",
            proto="logit_bias",
            neutral=None,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Row(
            "Sample from the smallest set of tokens whose probabilities add up to it. 1 = off.",
            _unless(lambda v: 0 < v <= 1, "`top_p` must be > 0.0 and <= 1.0"),
            openai="top_p",
            openai_reads=lambda value: value or _SMALLEST_TOP_P,
            proto="top_p",
            neutral=1.0,
        ),
    ] = None
    typical_p: Annotated[
        float | None,
        Row(
            "Locally typical sampling with this mass. 1 = off.",
            _unless(lambda v: 0 < v <= 1, "`typical_p` must be > 0.0 and <= 1.0"),
            openai="typical_p",
            proto="typical_p",
            neutral=1.0,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        Row(
            "Sample from the tokens at least so likely as this share of the most likely one. 0 = off.",
            _unless(lambda v: 0 <= v <= 1, "`min_p` must be >= 0.0 and <= 1.0"),
            openai="min_p",
            proto="min_p",
            neutral=0.0,
        ),
    ] = None
    top_k: Annotated[
        I32 | None,
        Row(
            "Sample from the so many most likely tokens.",
            _unless(lambda v: v > 0, "`top_k` must be strictly positive"),
            openai="top_k",
            openai_reads=lambda value: None if value in (0, -1) else value,
            proto="top_k",
            neutral=0,
        ),
    ] = None
    do_sample: Annotated[
        bool | None,
        Row("Sample; false or absent with no other sampling parameter = the most likely token."),
    ] = None
    max_new_tokens: Annotated[
        U32 | None,
        Row(
            "Most tokens to generate. Absent: as many as fit.",
            _unless(lambda v: v > 0, "`max_new_tokens` must be strictly positive"),
        ),
    ] = None
    min_new_tokens: Annotated[
        U32 | None,
        Row(
            "Before so many tokens, neither end-of-sequence nor a stop string ends the generation.",
            _min_new_tokens,
            openai="min_tokens",
            proto="min_new_tokens",
            neutral=0,
        ),
    ] = None
    stop: Annotated[list[str] | None, Row("Generation ends when one of these was generated.", _stop)] = None
    seed: Annotated[
        USIZE | None,
        Row(
            "Makes sampling repeatable. Absent: random.",
            _seed,
            openai="seed",
            openai_type=ANY_SEED | None,
            openai_reads=_openai_seed,
        ),
    ] = None
    top_n_tokens: Annotated[
        U32 | None, Row("Report the so many most likely tokens at each position.", _top_n_tokens)
    ] = None
    watermark: Annotated[
        bool | None, Row("Watermark the output (Kirchenbauer et al. 2023).", proto="watermark", neutral=False)
    ] = None
    truncate: Annotated[
        USIZE | None, Row("Keep only the last so many tokens of the prompt.", _truncate, after_inputs=True)
    ] = None
    return_full_text: Annotated[bool | None, Row("Put the prompt before the generated text.")] = None
    details: Annotated[bool | None, Row("Report tokens, log-probabilities and the reason of the end.")] = None
    decoder_input_details: Annotated[bool | None, Row("Report the prompt's tokens and log-probabilities.")] = None
    grammar: Annotated[
        GivenGrammar | None, Row("What the output must be: JSON that is valid against a schema, or match a regex.")
    ] = None
    adapter_id: Annotated[str | None, Row("LoRA adapter to use.", _adapter_id)] = None

    @property
    def asks_for_sampling(self) -> bool:
        """TGI's notion when it checks `best_of`: any sampling parameter was given."""
        given = (self.temperature, self.top_k, self.top_p, self.typical_p, self.min_p)
        return bool(self.do_sample) or any(value is not None for value in given)

    @property
    def samples(self) -> bool:
        """Whether tokens are really drawn at random: asked for, or a filter is on. Otherwise decoding is greedy."""
        shares = (self.top_p or 1) < 1 or (self.typical_p or 1) < 1 or (self.min_p or 0) > 0
        return bool(self.do_sample) or bool((self.temperature or 1) != 1 or self.top_k or shares)


def _rows() -> dict[str, Row]:
    rows = {}
    for name, hint in get_type_hints(GenerateParameters, include_extras=True).items():
        rows[name] = next(item for item in hint.__metadata__ if isinstance(item, Row))
    return rows


ROWS: dict[str, Row] = _rows()

# The parameters that every OpenAI route takes, with their names and types there.
OpenAISampling: type[msgspec.Struct] = msgspec.defstruct(
    "OpenAISampling",
    [
        (row.openai, row.openai_type or get_type_hints(GenerateParameters, include_extras=True)[name], None)
        for name, row in ROWS.items()
        if row.openai is not None
    ],
    kw_only=True,
)


def from_openai(sampling: msgspec.Struct, limits: Limits, **others: Any) -> GenerateParameters:
    """The parameters an OpenAI request asks for. others: what its route derives itself (max_new_tokens, stop, ...).

    Temperature 0 is greedy, whatever the other filters are (which must be right all the same: ValidationError);
    without a temperature OpenAI's routes sample.
    """
    values = {name: _read(row, getattr(sampling, row.openai)) for name, row in ROWS.items() if row.openai is not None}
    greedy = values["temperature"] == 0
    if greedy:
        values["temperature"] = None
        check(GenerateParameters(**values), limits, after_inputs=False)
        for name in ("top_k", "top_p", "typical_p", "min_p"):
            values[name] = None
    return GenerateParameters(do_sample=not greedy, **values, **others)


def _read(row: Row, value: Any) -> Any:
    return value if value is None or row.openai_reads is None else row.openai_reads(value)


def round_to_f32(parameters: GenerateParameters) -> None:
    """Replaces every float by the nearest 32-bit float, which is what TGI parses and the wire carries."""
    for name in ROWS:
        value = getattr(parameters, name)
        if isinstance(value, float):
            try:
                setattr(parameters, name, struct.unpack("f", struct.pack("f", value))[0])
            except OverflowError:
                setattr(parameters, name, math.copysign(math.inf, value))


def check(parameters: GenerateParameters, limits: Limits, *, after_inputs: bool) -> None:
    """Raises ValidationError for the first row whose rule is broken. See `Row.after_inputs`."""
    for name, row in ROWS.items():
        value = getattr(parameters, name)
        if value is None or row.rule is None or row.after_inputs is not after_inputs:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValidationError(f"`{name}` must be a 32-bit number. Given: {value}", param=name)
        sentence = row.rule(value, parameters, limits)
        if sentence is not None:
            raise ValidationError(sentence, param=name)


def to_proto(parameters: GenerateParameters, seed: int, end_token_ids: Sequence[int] = ()) -> pb.SamplingParameters:
    """The wire message. seed: the one to use, whether given or drawn. end_token_ids: the model's ends of sequence."""
    message = pb.SamplingParameters(do_sample=parameters.samples, seed=seed)
    for name, row in ROWS.items():
        if row.proto is None:
            continue
        value = getattr(parameters, name)
        if isinstance(value, dict):
            getattr(message, row.proto).update(value)
        elif value is not None or row.neutral is not None:
            setattr(message, row.proto, row.neutral if value is None else value)
    if parameters.min_new_tokens:
        message.end_token_ids.extend(end_token_ids)
    return message
