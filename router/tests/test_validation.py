"""Every row of TGI's validation table: what is refused, with which sentence, and which mistake is told first."""

from dataclasses import replace
from typing import Any

import pytest
from api_kit import tiny_tokenizer
from tgi_proto import generate_pb2 as pb
from tgi_router.errors import TemplateError, ValidationError
from tgi_router.parameters import ROWS, GenerateParameters, Limits, OpenAISampling, from_openai, to_proto
from tgi_router.tokenizer import Tokenizer
from tgi_router.validation import Prompt, Validated, Validator
from tokenizers import Tokenizer as LibraryTokenizer

LIMITS = Limits(
    max_input_tokens=20,
    max_total_tokens=30,
    max_best_of=2,
    max_stop_sequences=2,
    max_top_n_tokens=3,
    vocab_size=512,
)
RAISES = ". `{}` raises the limit"


@pytest.fixture(scope="module")
def validator() -> Validator:
    return Validator(Tokenizer(LibraryTokenizer.from_str(tiny_tokenizer()), {}), LIMITS, {600, 1, 0})


async def validate(validator: Validator, inputs: str = "hello", **values: Any) -> Validated:
    return (await validator.validate(Prompt(inputs, GenerateParameters(**values))))[0]


async def refusal(validator: Validator, inputs: str = "hello", **values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        await validate(validator, inputs, **values)
    assert caught.value.status == 422
    assert caught.value.error_type == "validation"
    assert caught.value.message.startswith("Input validation error: ")
    return caught.value.message.removeprefix("Input validation error: ")


TABLE: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3" + RAISES.format("--max-best-of")),
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0" + RAISES.format("--max-best-of")),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.0}, "`temperature` must be strictly positive"),
    ({"temperature": 1e-60}, "`temperature` must be strictly positive"),  # zero as a 32-bit float
    ({"temperature": 1e60}, "`temperature` must be a 32-bit number. Given: inf"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": 2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"logit_bias": {512: 1.0}}, "`logit_bias` must name token ids >= 0 and < 512. Given: 512"),
    ({"logit_bias": {-1: 1.0}}, "`logit_bias` must name token ids >= 0 and < 512. Given: -1"),
    ({"logit_bias": {5: 100.5}}, "`logit_bias` must be >= -100 and <= 100. Given: 100.5 for token 5"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "`logit_bias` must have at most 1024 entries. Given: 1025"),
    ({"min_p": -0.1}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"min_p": 1.1}, "`min_p` must be >= 0.0 and <= 1.0"),
    (
        {"min_new_tokens": 5, "max_new_tokens": 4},
        "`min_new_tokens` must be <= `max_new_tokens`. Given: 5 and 4",
    ),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"top_p": 1.1}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": 1.1}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -5}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    (
        {"stop": ["a", "b", "c"]},
        "`stop` supports up to 2 stop sequences. Given: 3" + RAISES.format("--max-stop-sequences"),
    ),
    ({"stop": ["x" * 301]}, "`stop` sequences must have at most 300 characters. Given: 301"),
    ({"stop": [""]}, "`stop` must not contain an empty string"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
    ({"seed": 2**64}, "`seed` must be <= 18446744073709551615. Given: 18446744073709551616"),
    ({"top_n_tokens": 4}, "`top_n_tokens` must be >= 0 and <= 3. Given: 4" + RAISES.format("--max-top-n-tokens")),
    ({"inputs": ""}, "`inputs` cannot be empty"),
    (
        {"truncate": 0},
        "`truncate` must be strictly positive and less than 20. Given: 0" + RAISES.format("--max-input-tokens"),
    ),
    (
        {"truncate": 21},
        "`truncate` must be strictly positive and less than 20. Given: 21" + RAISES.format("--max-input-tokens"),
    ),
    (
        {"max_new_tokens": 29},
        "`inputs` tokens + `max_new_tokens` must be <= 30. Given: 2 `inputs` tokens and 29 `max_new_tokens`"
        + RAISES.format("--max-total-tokens"),
    ),
    (
        {"inputs": "Z" * 24, "max_new_tokens": 1},
        "`inputs` must have less than 20 tokens. Given: 25" + RAISES.format("--max-input-tokens"),
    ),
    (
        {"adapter_id": "x"},
        "`adapter_id` 'x' is unknown: no adapters are loaded, and loading them is not built yet",
    ),
]


@pytest.mark.parametrize(("values", "sentence"), TABLE, ids=[str(values)[:60] for values, _ in TABLE])
async def test_what_is_wrong_is_refused_with_tgis_sentence(
    validator: Validator, values: dict[str, Any], sentence: str
) -> None:
    assert await refusal(validator, **values) == sentence


async def test_of_two_mistakes_the_one_tgi_checks_first_is_told(validator: Validator) -> None:
    ordered = [
        {"best_of": 3},
        {"temperature": 0.0},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": 3.0},
        {"top_p": 2.0},
        {"typical_p": 2.0},
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"stop": ["a", "b", "c"]},
        {"top_n_tokens": 4},
        {"inputs": ""},
        {"truncate": 0},
    ]
    for place, first in enumerate(ordered):
        later = {name: value for mistake in ordered[place:] for name, value in mistake.items()}
        assert await refusal(validator, **later) == await refusal(validator, **first)


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 1.0},
        {"typical_p": 1.0},
        {"best_of": 1},
        {"best_of": 2, "temperature": 0.5},
        {"best_of": 2, "top_k": 1},
        {"frequency_penalty": -2.0},
        {"stop": ["a", "b"]},
        {"seed": 2**64 - 1},
        {"top_n_tokens": 0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"presence_penalty": 2.0},
        {"logit_bias": {}},
        {"logit_bias": {0: -100.0, 511: 100.0}},
        {"min_new_tokens": 4, "max_new_tokens": 4},
        {"min_new_tokens": 4},
        {"truncate": 20},
        {"max_new_tokens": 28},
        {"decoder_input_details": True},
    ],
    ids=str,
)
async def test_what_is_right_at_the_edge_passes(validator: Validator, values: dict[str, Any]) -> None:
    assert (await validate(validator, **values)).request.token_ids


async def test_best_of_can_be_forbidden(validator: Validator) -> None:
    strict = Validator(validator._tokenizer, replace(LIMITS, max_best_of=1))
    assert (await refusal(strict, best_of=2)).startswith("`best_of` != 1 is not allowed for this endpoint")


async def test_the_longest_allowed_prompt_passes_and_may_generate_what_is_left(validator: Validator) -> None:
    request = (await validate(validator, "Z" * 19)).request
    assert len(request.token_ids) == 20
    assert request.max_new_tokens == 10


async def test_a_hopelessly_long_prompt_is_refused_before_it_is_tokenized(validator: Validator) -> None:
    sentence = await refusal(validator, "x" * 10_000)
    assert sentence.startswith("`inputs` must have less than 20 tokens. Given: at least ")
    truncated = await validate(validator, "x" * 10_000, truncate=7)
    assert len(truncated.request.token_ids) == 7


async def test_what_the_shard_gets_is_what_was_asked_for(validator: Validator) -> None:
    request = (
        await validate(
            validator,
            temperature=0.1,
            top_k=7,
            top_p=0.5,
            typical_p=0.25,
            repetition_penalty=1.5,
            frequency_penalty=-0.5,
            presence_penalty=0.75,
            min_p=0.125,
            logit_bias={7: 1.5, 3: -100.0},
            min_new_tokens=2,
            watermark=True,
            seed=11,
            top_n_tokens=2,
            decoder_input_details=True,
        )
    ).request
    assert request.sampling == pb.SamplingParameters(
        temperature=0.1,
        top_k=7,
        top_p=0.5,
        typical_p=0.25,
        do_sample=True,
        seed=11,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.75,
        min_p=0.125,
        logit_bias={3: -100.0, 7: 1.5},
        min_new_tokens=2,
        end_token_ids=[0, 1],  # of the model's ends those that its vocabulary has
        watermark=True,
    )
    assert (request.top_n_tokens, request.prompt_logprobs) == (2, True)


@pytest.mark.parametrize(
    ("values", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.9}, True),
        ({"top_k": 3}, True),
        ({"top_p": 0.9}, True),
        ({"top_p": 1.0}, False),
        ({"typical_p": 0.9}, True),
        ({"repetition_penalty": 2.0}, False),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.0}, False),
        ({"presence_penalty": 1.0, "logit_bias": {3: 1.0}, "min_new_tokens": 1}, False),
    ],
    ids=str,
)
async def test_sampling_happens_when_asked_for_or_when_a_filter_is_on(
    validator: Validator, values: dict[str, Any], samples: bool
) -> None:
    validated = await validate(validator, seed=5, **values)
    assert validated.request.sampling.do_sample is samples
    assert validated.seed == (5 if samples else None)


def test_every_proto_field_has_one_row_and_its_neutral_value_is_off() -> None:
    fields = {field.name for field in pb.SamplingParameters.DESCRIPTOR.fields}
    assert {row.proto for row in ROWS.values() if row.proto} == fields - {"do_sample", "seed", "end_token_ids"}
    assert to_proto(GenerateParameters(), 0) == pb.SamplingParameters(
        temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0
    )


def test_every_row_has_a_sentence_of_help_and_every_field_a_row() -> None:
    assert list(ROWS) == list(GenerateParameters.__struct_fields__)
    assert all(row.help.endswith(".") for row in ROWS.values())


def test_temperature_zero_is_greedy_on_openai_routes_and_wrong_filters_are_told_all_the_same() -> None:
    greedy = from_openai(OpenAISampling(temperature=0, top_p=0.5, top_k=3), LIMITS)
    assert not greedy.samples
    assert from_openai(OpenAISampling(), LIMITS).samples
    with pytest.raises(ValidationError, match="top_p"):
        from_openai(OpenAISampling(temperature=0, top_p=7.0), LIMITS)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"top_k": 0}, {"top_k": None}),
        ({"top_k": -1}, {"top_k": None}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"seed": 0}, {"seed": 0}),
        ({"min_tokens": 3}, {"min_new_tokens": 3}),
        ({"presence_penalty": 0.5, "min_p": 0.2}, {"presence_penalty": 0.5, "min_p": 0.2}),
        ({"temperature": 0, "min_p": 0.2, "top_k": 4}, {"min_p": None, "top_k": None}),
    ],
    ids=str,
)
def test_values_that_openais_and_vllms_clients_send_are_understood(
    given: dict[str, Any], meant: dict[str, Any]
) -> None:
    read = from_openai(OpenAISampling(**given), LIMITS)
    assert {name: getattr(read, name) for name in meant} == meant


@pytest.mark.parametrize("wrong", [{"top_k": -2}, {"top_p": -0.1}, {"min_p": 2.0}], ids=str)
async def test_what_means_nothing_there_either_is_refused(validator: Validator, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        await validator.validate(Prompt("hello", from_openai(OpenAISampling(**wrong), LIMITS)))


async def test_a_failing_template_fails_the_request(validator: Validator) -> None:
    def fails() -> str:
        raise TemplateError("no")

    with pytest.raises(TemplateError):
        await validator.validate(Prompt(fails, GenerateParameters()))


async def test_copies_differ_in_their_seeds_only(validator: Validator) -> None:
    one, two, three = await validator.validate(Prompt("hello", GenerateParameters(do_sample=True, seed=2**64 - 1)), 3)
    assert one.seed == 2**64 - 1
    assert len({one.seed, two.seed, three.seed}) == 3
    assert one.request.token_ids == two.request.token_ids == three.request.token_ids
