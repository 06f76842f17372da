"""The engine and its row table: one bad row fails alone, contradictions end everything, and what an answer holds."""

import struct
import zlib
from pathlib import Path

import driving
import pytest
import torch
from driving import BLOCK_SIZE, NUM_BLOCKS, SAMPLED, VOCAB, Driver
from tgi_proto import generate_pb2 as pb
from tgi_shard.engine import Engine
from tgi_shard.errors import Bug, StepOrder
from tgi_shard.models.decoder import Decoder

PROMPT = [5, 17, 99, 250, 31, 8, 77]
POISON = 42


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    torch.set_num_threads(1)
    return driving.load_tiny(driving.save_tiny_llama(Path(tmp_path_factory.mktemp("llama"))))


@pytest.fixture
def engine(model: Decoder) -> Engine:
    return driving.make_engine(model)


def admission(request_id: int = 1, **fields: object) -> pb.Admission:
    values: dict = {"token_ids": PROMPT, "num_prompt_tokens": len(PROMPT), "blocks": [0, 1], **fields}
    return pb.Admission(request_id=request_id, sampling=values.pop("sampling", driving.sampling()), **values)


def plan(step: int, *scheduled: tuple[int, int, int], forget: tuple[int, ...] = ()) -> pb.StepPlan:
    """scheduled: (request id, number of tokens, computed before)."""
    rows = [pb.Scheduled(request_id=i, num_tokens=n, num_computed_tokens=c) for i, n, c in scheduled]
    return pb.StepPlan(step=step, scheduled=rows, forget=forget)


BAD_ADMISSIONS = [
    ({"token_ids": []}, "0 tokens"),
    ({"num_prompt_tokens": 8}, "7 tokens, of them 8 prompt tokens"),
    ({"token_ids": [1] * 300, "num_prompt_tokens": 300}, "1 to 256 (`--max-total-tokens`)"),
    ({"token_ids": [VOCAB], "num_prompt_tokens": 1}, f"token id {VOCAB} is not in the model's vocabulary of {VOCAB}"),
    ({"num_cached_tokens": 7}, "7 of 7 tokens are"),
    ({"num_cached_tokens": 4, "prompt_logprobs": True}, "the whole prompt"),
    ({"blocks": [0, NUM_BLOCKS]}, f"block {NUM_BLOCKS} as number 2"),
    ({"blocks": [0] * 65}, "a table holds 64"),
    ({"blocks": [0]}, "1 blocks of 4 slots do not hold 7 tokens"),
    ({"sampling": driving.sampling(temperature=0.0)}, "`temperature` must be a finite number > 0, given: 0.0"),
    ({"sampling": driving.sampling(top_p=1.5)}, "`top_p` must be > 0 and <= 1, given: 1.5"),
    ({"sampling": driving.sampling(logit_bias={VOCAB: 1.0})}, f"token id {VOCAB} of `logit_bias` or `end_token_ids`"),
    ({"sampling": driving.sampling(end_token_ids=[1, VOCAB])}, f"token id {VOCAB} of `logit_bias` or `end_token_ids`"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_ADMISSIONS)
def test_a_bad_admission_fails_alone(engine: Engine, fields: dict, message: str):
    good = admission(2, blocks=[2, 3])
    response = engine.step([admission(1, **fields), good], plan(1, (1, 7, 0), (2, 7, 0)))
    assert [error.request_id for error in response.errors] == [1]
    assert message in response.errors[0].message
    assert [generation.request_id for generation in response.generations] == [2]
    # Its row is free again, and the next step, sent before the error was known, may still name it.
    response = engine.step([], plan(2, (1, 1, 7), (2, 1, 7)))
    assert not response.errors
    assert [generation.request_id for generation in response.generations] == [2]
    response = engine.step([admission(1)], plan(3, (1, 7, 0), forget=(1, 2)))
    assert [generation.request_id for generation in response.generations] == [1]


BAD_SCHEDULES = [
    ((1, 1, 6), "6 tokens are said to be computed, here 7 are"),
    ((1, 0, 7), "tokens 7 to 7 are to be computed; 8 are known"),
    ((1, 2, 7), "tokens 7 to 9 are to be computed; 8 are known"),
]


@pytest.mark.parametrize(("scheduled", "message"), BAD_SCHEDULES)
def test_a_row_scheduled_wrongly_fails_alone(engine: Engine, scheduled: tuple[int, int, int], message: str):
    engine.step([admission(1), admission(2, blocks=[2, 3])], plan(1, (1, 7, 0), (2, 7, 0)))
    response = engine.step([], plan(2, scheduled, (2, 1, 7)))
    assert [(error.request_id, error.message) for error in response.errors] == [(1, message)]
    assert [generation.request_id for generation in response.generations] == [2]


CONTRADICTIONS = [
    ([], plan(1, (7, 1, 0)), "schedules request 7 twice or without a row"),
    ([admission()], plan(1, (1, 3, 0), (1, 4, 3)), "schedules request 1 twice or without a row"),
    ([admission(), admission()], plan(1, (1, 7, 0)), "admitted twice"),
    ([admission(i) for i in range(1, 18)], plan(1), "beyond --max-rows 16"),
    (
        [admission(1, token_ids=[1] * 200, num_prompt_tokens=200, blocks=range(50)),
         admission(2, token_ids=[1] * 200, num_prompt_tokens=200, blocks=range(50))],
        plan(1, (1, 200, 0), (2, 200, 0)),
        "400 tokens, more than --max-step-tokens 256",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("admissions", "step", "message"), CONTRADICTIONS)
def test_a_plan_that_contradicts_the_table_is_a_bug(engine: Engine, admissions: list, step: pb.StepPlan, message: str):
    with pytest.raises(Bug, match=message):
        engine.step(admissions, step)


def test_steps_are_consecutive_from_one_after_a_reset(engine: Engine):
    with pytest.raises(StepOrder, match="step 2 came, step 1 is next"):
        engine.step([], plan(2))
    engine.step([admission()], plan(1, (1, 7, 0)))
    with pytest.raises(StepOrder, match="step 1 came, step 2 is next"):
        engine.step([], plan(1))
    engine.reset()
    response = engine.step([admission()], plan(1, (1, 7, 0)))  # the row is gone: it can be admitted again
    assert len(response.generations) == 1


def test_an_empty_step_answers_and_forgets(engine: Engine):
    engine.step([admission()], plan(1, (1, 7, 0)))
    response = engine.step([], plan(2, forget=(1, 99)))
    assert (response.step, response.digest, len(response.generations)) == (2, 0, 0)
    with pytest.raises(Bug):
        engine.step([], plan(3, (1, 1, 7)))


def test_a_part_of_a_prompt_yields_nothing(engine: Engine):
    response = engine.step([admission()], plan(1, (1, 5, 0)))
    assert len(response.generations) == 0
    response = engine.step([], plan(2, (1, 2, 5)))
    assert [len(generation.token_ids) for generation in response.generations] == [1]


def test_the_digest_covers_ids_and_tokens(engine: Engine):
    response = engine.step([admission(1), admission(2, blocks=[2, 3])], plan(1, (2, 7, 0), (1, 7, 0)))
    pairs = [(generation.request_id, generation.token_ids[0]) for generation in response.generations]
    assert [request_id for request_id, _ in pairs] == [2, 1]  # the plan's order
    assert response.digest == zlib.crc32(b"".join(struct.pack("<QI", *pair) for pair in pairs))


def test_other_ranks_answer_with_the_digest_only(model: Decoder, engine: Engine):
    other = driving.make_engine(model)
    other._rank = 1
    step = ([admission(prompt_logprobs=True)], plan(1, (1, 7, 0)))
    first, second = engine.step(*step), other.step(*step)
    assert second.digest == first.digest != 0
    assert len(second.generations) == 0
    assert first.forward_ns > 0


def test_a_request_that_ends_with_the_last_slot_of_its_row(model: Decoder):
    d = Driver(driving.make_engine(model).step)
    live = d.add([7] * 250)
    d.run(6)
    assert len(live.generated) == 6  # 256 tokens: the row is full, and the last token was still chosen
    d.step()
    assert live.error is None
    assert len(live.generated) == 7  # chosen from the 256th token; nothing can follow it


@pytest.mark.parametrize("fault", ["row.apply:raise", "row.logits:nan"])
@pytest.mark.parametrize("fields", [{}, SAMPLED])
def test_one_poisoned_request_fails_alone(model: Decoder, fault: str, fields: dict):
    d = Driver(driving.make_engine(model, faults=f"{fault}:token={POISON}").step)
    good, bad = d.add(PROMPT, **fields), d.add([POISON, *PROMPT], **fields)
    d.run(4)
    clean = Driver(driving.make_engine(model).step)
    expected = clean.add(PROMPT, **fields)
    clean.run(4)
    assert bad.error == {
        "row.apply:raise": "the shard could not handle the request: InjectedFault: injected fault at row.apply",
        "row.logits:nan": "the model's logits are not finite numbers; the request cannot go on",
    }.get(fault)
    assert bad.generated == []
    assert good.generated == expected.generated


def test_prompt_logprobs_that_are_not_finite_fail_their_request_only(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    logits = Decoder.logits

    def poisoned(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        z = logits(self, hidden)
        if len(z) == len(PROMPT) - 1:  # the prompt's, not the sampled token's
            z[2] = torch.nan
        return z

    monkeypatch.setattr(Decoder, "logits", poisoned)
    d = Driver(driving.make_engine(model).step)
    good, bad = d.add(PROMPT), d.add(PROMPT, prompt_logprobs=True)
    d.run(2)
    assert bad.error is not None
    assert len(good.generated) == 2


def test_rows_and_blocks_are_reused_without_a_trace(model: Decoder):
    """Many short lives through few rows: each gets the tokens it would get in a fresh engine."""
    engine = driving.make_engine(model, max_rows=3)
    d = Driver(engine.step)
    expected: dict[int, list[int]] = {}
    for i in range(12):
        live = d.add([3 + i, *PROMPT[: 1 + i % 5]], repetition_penalty=1.2)
        d.run(3)
        fresh = Driver(driving.make_engine(model).step)
        alone = fresh.add(live.prompt, repetition_penalty=1.2)
        fresh.run(3)
        expected[i] = alone.generated
        assert live.generated == alone.generated
        d.finish(live)
        d._free += live.blocks
    assert len({tuple(tokens) for tokens in expected.values()}) > 6


def test_sampled_tokens_can_be_more_than_a_block(model: Decoder):
    d = Driver(driving.make_engine(model).step)
    live = d.add(PROMPT, **SAMPLED)
    d.run(3 * BLOCK_SIZE)
    assert len(live.generated) == 3 * BLOCK_SIZE
    assert len(live.blocks) == -(-(len(PROMPT) + 3 * BLOCK_SIZE - 1) // BLOCK_SIZE)
