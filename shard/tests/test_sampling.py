"""The sampler against transformers' logits processors, the softmax it draws from, and itself in a crowd."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tgi_proto import generate_pb2 as pb
from tgi_shard.errors import RowProblem
from tgi_shard.rows import sampling_parameters
from tgi_shard.sampling import draw, logprobs, noise, sampler, truncation
from tgi_shard.sampling.bias import BiasTable
from tgi_shard.sampling.parameters import RECORD, SamplingParameters
from tgi_shard.sampling.sampler import Sampled, Sampler, SamplingBatch
from tgi_shard.sampling.watermark import HASH_KEY, Watermark
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

VOCAB = 1000  # not a multiple of the draw's blocks


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_batch(
    parameters: list[SamplingParameters], history: list[list[int]] | None = None, prompts: list[int] | None = None
) -> SamplingBatch:
    """A batch whose rows 0, 1 … have these parameters and tokens; without `history` each row knows ten tokens."""
    history = history or [list(range(10)) for _ in parameters]
    tokens = torch.full((len(parameters), max(map(len, history)) + 4), 77, dtype=torch.int32)
    for row, ids in enumerate(history):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    lengths = np.array([len(ids) for ids in history])
    bias = BiasTable(len(parameters), torch.device("cpu"))
    for row, one in enumerate(parameters):
        bias.set(row, one)
    return SamplingBatch(
        params=np.array([p.record() for p in parameters], RECORD),
        rows=np.arange(len(parameters)),
        num_tokens=lengths,
        num_prompt_tokens=np.array(prompts) if prompts else lengths,
        tokens=tokens,
        bias=bias,
    )


def sample(logits: torch.Tensor, parameters: list[SamplingParameters], window: int = 256, **history: list) -> Sampled:
    choose = Sampler(logits.shape[1], Watermark(logits.shape[1], 0.5, 2.0), window)
    return choose(logits.clone(), make_batch(parameters, **history))


def random_logits(rows: int, spread: float = 3.0, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def make_limits(rows: int, top_k: int, top_p: float, min_p: float, typical_p: float) -> truncation.Limits:
    log_min_p = float(np.log(min_p)) if min_p else -torch.inf
    values = (torch.full((rows,), value) for value in (top_p, log_min_p, typical_p))
    return truncation.Limits(torch.full((rows,), top_k), *values)


def hf_truncated(z: torch.Tensor, top_k: int, top_p: float, min_p: float, typical_p: float) -> torch.Tensor:
    """What transformers leaves of scores `[N, V]`, in TGI's and its own order of filters."""
    if top_k:
        z = TopKLogitsWarper(top_k)(None, z)
    if top_p < 1:
        z = TopPLogitsWarper(top_p)(None, z)
    if min_p:
        z = MinPLogitsWarper(min_p)(None, z)
    if typical_p < 1:
        z = TypicalLogitsWarper(typical_p)(None, z)
    return z


FILTERS = [
    (1, 1.0, 0.0, 1.0),
    (50, 1.0, 0.0, 1.0),
    (0, 0.9, 0.0, 1.0),
    (0, 0.999, 0.0, 1.0),
    (0, 1e-6, 0.0, 1.0),
    (0, 1.0, 0.0, 0.9),
    (0, 1.0, 0.0, 0.2),
    (50, 0.9, 0.0, 1.0),
    (300, 0.8, 0.0, 1.0),  # more than a window
    (20, 1.0, 0.0, 0.7),
    (200, 0.95, 0.0, 0.8),
    (VOCAB, 0.95, 0.0, 0.8),
    (5000, 1.0, 0.0, 1.0),  # more than there are
    (0, 1.0, 0.1, 1.0),
    (0, 1.0, 1.0, 1.0),
    (0, 1.0, 1e-4, 1.0),
    (300, 0.9, 0.05, 1.0),
    (30, 0.95, 0.02, 0.8),
]


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p", "typical_p"), FILTERS)
def test_over_vocabulary_keeps_what_transformers_keeps(top_k, top_p, min_p, typical_p, spread, monkeypatch):
    z = random_logits(6, spread)
    limits = make_limits(6, top_k, top_p, min_p, typical_p)
    expected = hf_truncated(z, top_k, top_p, min_p, typical_p)
    for first_tried in (100_000, 700, 20):  # bisection only; sometimes; mostly
        monkeypatch.setattr(truncation, "_FIRST_TRIED", first_tried)
        uses = {"top_k": top_k > 0, "top_p": top_p < 1, "min_p": min_p > 0, "typical_p": typical_p < 1}
        ours = truncation.over_vocabulary(z, limits, **uses)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p", "typical_p"), FILTERS)
def test_a_window_that_fits_keeps_what_transformers_keeps(top_k, top_p, min_p, typical_p, spread):
    z = random_logits(6, spread)
    limits = make_limits(6, top_k, top_p, min_p, typical_p)
    values, ids, fits = truncation.in_window(z, limits, 256)
    expected = hf_truncated(z, top_k, top_p, min_p, typical_p)
    survivors_by_filters_before_typical = (hf_truncated(z, top_k, top_p, min_p, 1.0) > -torch.inf).sum(-1)
    assert fits.tolist() == ((survivors_by_filters_before_typical < 256) & (top_k <= 256)).tolist()
    ours = torch.full_like(z, -torch.inf).scatter_(1, ids, values)
    torch.testing.assert_close(ours[fits], expected[fits])


def test_ties_at_the_cut_all_survive_in_every_path():
    z = torch.zeros(1, VOCAB)
    z[0, 100:400] = 5.0  # 300 equal best tokens: more than a window
    z[0, 7] = 9.0
    limits = make_limits(1, 10, 1.0, 0.0, 1.0)
    kept = truncation.over_vocabulary(z, limits, top_k=True, top_p=False, min_p=False, typical_p=False)
    assert (kept > -torch.inf).sum() == 301
    assert not truncation.in_window(z, limits, 256)[2].item()
    z[0, 110:] = 0.0
    values, _, fits = truncation.in_window(z, limits, 256)
    assert fits.item()
    assert (values > -torch.inf).sum() == 11


MIXED = [
    SamplingParameters(),
    SamplingParameters(do_sample=True, seed=1),
    SamplingParameters(temperature=0.7, seed=2),
    SamplingParameters(top_k=5, seed=3),
    SamplingParameters(top_p=0.9, seed=4, temperature=1.3),
    SamplingParameters(top_k=400, top_p=0.99, seed=5),
    SamplingParameters(typical_p=0.5, seed=6),
    SamplingParameters(top_k=40, top_p=0.9, typical_p=0.9, seed=7, repetition_penalty=1.2),
    SamplingParameters(repetition_penalty=1.3, frequency_penalty=0.5, top_n=3),
    SamplingParameters(watermark=True, top_n=2),
    SamplingParameters(watermark=True, do_sample=True, frequency_penalty=-0.5, top_n=4, seed=2**64 - 1),
    SamplingParameters(min_p=0.1, seed=8, temperature=1.5, presence_penalty=1.0, top_n=2),
    SamplingParameters(min_p=0.001, top_k=300, seed=9, logit_bias=((3, 5.0), (999, -100.0)), frequency_penalty=0.3),
    SamplingParameters(do_sample=True, seed=10, min_new_tokens=9, end_token_ids=(0, 5), top_n=3),
]


def test_a_row_in_a_crowd_gets_the_token_it_gets_alone():
    logits = random_logits(len(MIXED))
    crowd = sample(logits, MIXED)
    for i, parameters in enumerate(MIXED):
        alone = sample(logits[i : i + 1], [parameters])
        assert alone.ids[0] == crowd.ids[i]
        torch.testing.assert_close(alone.logprobs[0], crowd.logprobs[i])
        assert alone.top.get(0) == crowd.top.get(i)


def test_the_window_changes_nothing_but_the_work():
    limits = [
        (5, 1.0, 0.0, 1.0),
        (0, 0.5, 0.0, 1.0),
        (300, 0.9, 0.0, 2.0),
        (0, 0.95, 0.0, 3.0),
        (0, 1.0, 0.1, 2.0),
    ] * 20
    parameters = [
        SamplingParameters(top_k=k, top_p=p, min_p=m, temperature=t, seed=s, top_n=3)
        for s, (k, p, m, t) in enumerate(limits)
    ]
    logits = random_logits(len(parameters))
    within, without = sample(logits, parameters, 256), sample(logits, parameters, 0)
    assert within.ids.tolist() == without.ids.tolist()
    torch.testing.assert_close(within.logprobs, without.logprobs)
    assert {i: [t for t, _ in top] for i, top in within.top.items()} == {
        i: [t for t, _ in top] for i, top in without.top.items()
    }


def test_a_greedy_row_gets_the_best_token_and_its_log_probability():
    logits = random_logits(4)
    out = sample(logits, [SamplingParameters()] * 4)
    assert out.ids.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(out.logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize(("top_k", "top_p", "min_p", "typical_p"), FILTERS)
@pytest.mark.parametrize("window", [0, 256])
def test_a_sampled_row_reports_the_log_probability_of_the_processed_distribution(
    top_k, top_p, min_p, typical_p, window
):
    logits = random_logits(8)
    parameters = SamplingParameters(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    out = sample(logits, [parameters] * 8, window)
    expected = hf_truncated(TemperatureLogitsWarper(0.8)(None, logits), top_k, top_p, min_p, typical_p).log_softmax(-1)
    torch.testing.assert_close(out.logprobs, expected.gather(1, out.ids.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=1e-5)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Standardised statistic: about normal(0, 1) when the counts come from the probabilities."""
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * max(freedom, 1)))


DRAWN = [
    (0, 1.0, 0.0, 1.0, 1.0),
    (0, 1.0, 0.0, 1.0, 2.0),
    (20, 1.0, 0.0, 1.0, 1.0),
    (0, 0.8, 0.0, 1.0, 1.5),
    (30, 0.9, 0.0, 0.8, 1.0),
    (0, 1.0, 0.2, 1.0, 1.5),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p", "typical_p", "temperature"), DRAWN)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_softmax(top_k, top_p, min_p, typical_p, temperature, vary):
    batches, rows, vocab = 60, 500, 600
    logits = random_logits(1, 1.5, vocab)
    parameters = SamplingParameters(
        do_sample=True, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, temperature=temperature
    )
    batch = make_batch([parameters])
    choose = Sampler(vocab, Watermark(vocab, 0.5, 2.0))
    counts = np.zeros(vocab, np.int64)
    for first in range(0, batches * rows, rows):
        params, positions = np.repeat(batch.params, rows), np.full(rows, 10)
        if vary == "seed":
            params["seed"] = np.arange(first, first + rows)
        else:
            positions = np.arange(first, first + rows)
        many = SamplingBatch(params, np.zeros(rows, np.int64), positions, positions, batch.tokens, batch.bias)
        ids = choose(logits.expand(rows, -1).clone(), many).ids
        counts += np.bincount(ids.numpy(), minlength=vocab)
    expected = hf_truncated(logits / temperature, top_k, top_p, min_p, typical_p).softmax(-1)[0].double().numpy()
    assert abs(chi_square(counts, expected)) < 4


def keys_of(seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(noise.keys(np.array(seeds), np.array(positions)))


def test_noise_is_gumbel_and_depends_on_each_of_seed_position_and_token():
    keys = keys_of(range(200), [5] * 200)
    values = noise.gumbel(keys, torch.arange(500)).flatten()
    assert values.isfinite().all()
    assert abs(values.mean().item() - 0.57722) < 0.02
    assert abs(values.var().item() - np.pi**2 / 6) < 0.04
    grid = noise.gumbel(keys_of([1, 1, 2, 2], [7, 8, 7, 8]), torch.tensor([0, 1, 2]))
    assert grid.unique().numel() == 12


def test_noise_never_changes():
    """These numbers are part of the interface: a request resumed by a newer shard must go on as it began."""
    keys = keys_of([0, 1, -1], [0, 10, 4095])
    assert keys.tolist() == [-6411193824288604561, -4368791056399217351, 7274870546675788305]
    values = noise.gumbel(keys, torch.tensor([0, 31999]))[:, 1].tolist()
    assert values == pytest.approx([-0.5662577167945915, 0.881703459739632, -1.3379397485342692], rel=1e-12)
    assert noise.mix(torch.tensor(0)) == 0xE220A8397B1DCDAF - 2**64  # splitmix64's published first output for seed 0


def test_both_draws_choose_the_same_token():
    z = torch.full((50, draw.padded_width(VOCAB)), -torch.inf)
    z[:, :VOCAB] = random_logits(50)
    keys = keys_of(range(50), range(50))
    values, ids = z.sort(-1, descending=True)
    chosen, norm = draw.from_vocabulary(z, keys)
    chosen_too, norm_too = draw.from_candidates(values, ids, VOCAB, keys)
    assert chosen.tolist() == chosen_too.tolist()
    torch.testing.assert_close(norm, norm_too)


def test_the_repetition_penalty_is_transformers():
    logits = random_logits(3)
    history = [[5, 9, 5, 700], [1, 2, 3, 4, 999], [0, 0, 0]]
    parameters = [SamplingParameters(repetition_penalty=p, top_n=VOCAB) for p in (1.3, 0.8, 2.0)]
    out = sample(logits, parameters, history=history, prompts=[2, 5, 1])
    for i, (ids, p) in enumerate(zip(history, parameters, strict=True)):
        penalised = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(torch.tensor([ids]), logits[i : i + 1])
        expected = penalised.log_softmax(-1)[0]
        assert len(out.top[i]) == VOCAB
        got = torch.empty(VOCAB)
        for token, value in out.top[i]:
            got[token] = value
        torch.testing.assert_close(got, expected)


def test_the_frequency_penalty_counts_generated_tokens_only():
    logits = random_logits(2)
    history = [[5, 5, 9, 9, 9, 3], [8, 8, 8]]
    parameters = [SamplingParameters(frequency_penalty=0.5, top_n=VOCAB)] * 2
    out = sample(logits, parameters, history=history, prompts=[3, 3])
    expected = logits.clone()
    expected[0, 9] -= 2 * 0.5
    expected[0, 3] -= 0.5
    for i in range(2):
        scores = expected[i].log_softmax(-1)
        assert all(value == pytest.approx(scores[token].item(), abs=1e-5) for token, value in out.top[i])


def all_logprobs(out: Sampled, row: int, vocab: int = VOCAB) -> torch.Tensor:
    """`[V]`, of a row that asked for that many top tokens; -inf where a token is impossible."""
    got = torch.full((vocab,), -torch.inf)
    for token, value in out.top[row]:
        got[token] = value
    return got


def test_presence_and_frequency_penalties_are_openais_formula():
    """logit - count * frequency - (count > 0) * presence, counts over generated tokens."""
    logits = random_logits(5)
    history = [[5, 5, 9, 9, 9, 3], [8, 8, 8], [1, 2, 700, 2, 700], [6, 7], [4, 4, 4, 4]]
    prompts = [3, 3, 2, 1, 1]
    amounts = [(0.0, 0.8), (0.5, 2.0), (1.1, -0.7), (0.0, -2.0), (0.4, 0.0)]
    parameters = [SamplingParameters(frequency_penalty=f, presence_penalty=p, top_n=VOCAB) for f, p in amounts]
    out = sample(logits, parameters, history=history, prompts=prompts)
    for i, (frequency, presence) in enumerate(amounts):
        counts = torch.bincount(torch.tensor(history[i][prompts[i] :], dtype=torch.int64), minlength=VOCAB)
        expected = logits[i] - counts * frequency - (counts > 0) * presence
        torch.testing.assert_close(all_logprobs(out, i), expected.log_softmax(-1))


def test_a_logit_bias_is_transformers_sequence_bias_of_single_tokens():
    logits = random_logits(4)
    biases = [{3: 5.0}, {0: 1.5, 999: -100.0, 500: 100.0}, {}, {i: i / 10 - 5 for i in range(100)}]
    parameters = [SamplingParameters(logit_bias=tuple(bias.items()), top_n=VOCAB) for bias in biases]
    out = sample(logits, parameters)
    for i, bias in enumerate(biases):
        expected = logits[i : i + 1]
        if bias:
            processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
            expected = processor(torch.zeros(1, 1, dtype=torch.int64), expected)
        torch.testing.assert_close(all_logprobs(out, i), expected.log_softmax(-1)[0])


def test_a_bias_of_minus_100_bans_and_of_100_forces():
    logits = random_logits(200, 5.0)
    best = logits.argmax(-1).tolist()
    banned = [SamplingParameters(do_sample=True, seed=s, logit_bias=((best[s], -100.0),)) for s in range(200)]
    assert not (sample(logits, banned).ids == torch.tensor(best)).any()
    forced = [SamplingParameters(do_sample=True, seed=s, logit_bias=((7, 100.0), (8, 100.0))) for s in range(200)]
    assert set(sample(logits, forced).ids.tolist()) == {7, 8}


def test_the_end_is_held_off_as_by_transformers_until_the_minimum_is_reached():
    logits = random_logits(6)
    logits[:, 42] = 20.0
    history = [[1] * 4 + [2] * generated for generated in range(6)]
    parameters = [SamplingParameters(min_new_tokens=3, end_token_ids=(42, 0), top_n=VOCAB)] * 6
    out = sample(logits, parameters, history=history, prompts=[4] * 6)
    for i, ids in enumerate(history):
        processor = MinNewTokensLengthLogitsProcessor(4, 3, [42, 0], device="cpu")
        expected = processor(torch.tensor([ids]), logits[i : i + 1])
        got = all_logprobs(out, i)
        assert (got[[42, 0]] < -1e8).tolist() == [i < 3] * 2
        torch.testing.assert_close(got.exp(), expected.softmax(-1)[0])
    assert (out.ids == 42).tolist() == [False] * 3 + [True] * 3


def test_where_nothing_but_the_end_is_possible_it_comes_in_spite_of_the_minimum():
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 42] = 1.0
    out = sample(logits, [SamplingParameters(min_new_tokens=3, end_token_ids=(42,))])
    assert (out.ids.item(), out.logprobs.item()) == (42, 0.0)


def test_a_line_of_the_bias_table_is_replaced_with_its_row():
    table = BiasTable(2, torch.device("cpu"))
    table.set(1, SamplingParameters(logit_bias=((4, 1.0), (5, 2.0), (6, 3.0))))
    table.set(0, SamplingParameters(logit_bias=tuple((i, 1.0) for i in range(9))))
    table.set(1, SamplingParameters(logit_bias=((5, 7.0),)))
    logits = torch.zeros(1, 10)
    table.apply(logits, torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    assert logits.tolist() == [[0, 0, 0, 0, 0, 7.0, 0, 0, 0, 0]]


def test_long_histories_are_penalised_in_parts(monkeypatch: pytest.MonkeyPatch):
    logits, history = random_logits(5), [[i, 10 * i, 7, 7, i] * (i + 1) for i in range(5)]
    parameters = [
        SamplingParameters(repetition_penalty=1.5, frequency_penalty=0.1 * i, presence_penalty=0.2 * i)
        for i in range(5)
    ]
    whole = sample(logits, parameters, history=history, prompts=[2] * 5)
    monkeypatch.setattr(sampler, "_MAX_HISTORY", 60)
    parts = sample(logits, parameters, history=history, prompts=[2] * 5)
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.logprobs.tolist() == whole.logprobs.tolist()


def test_the_watermark_is_tgis_green_list():
    watermark = Watermark(10, 0.5, 2.0)
    green = watermark.green_list(7)
    generator = torch.Generator().manual_seed(HASH_KEY * 7)
    assert sorted(torch.randperm(10, generator=generator)[:5].tolist()) == green.nonzero().flatten().tolist()
    assert green.sum() == int(10 * 0.5)
    logits = torch.ones(2, 10)
    watermark.apply(logits, [1], [7])
    assert (logits[0] == 1).all()  # only the rows that ask for it
    assert (logits[1] == torch.where(green, 3.0, 1.0)).all()


def test_the_watermark_comes_from_the_last_token():
    logits = torch.zeros(1, VOCAB)
    out = sample(logits, [SamplingParameters(watermark=True, top_n=1)], history=[[1, 2, 42]])
    green = Watermark(VOCAB, 0.5, 2.0).green_list(42)
    assert [token for token, _ in out.top[0]] == green.nonzero().flatten().tolist()


def test_the_watermarks_cache_is_bounded_and_repeats_itself():
    watermark = Watermark(50, 0.5, 2.0)
    first = watermark.green_list(0).clone()
    for token in range(1, 300):
        watermark.green_list(token)
    assert (watermark.green_list(0) == first).all()


@pytest.mark.parametrize(("n", "expected"), [(2, [0, 3]), (3, [0, 3, 1, 4]), (4, [0, 3, 1, 4]), (5, [0, 3, 1, 4, 2])])
def test_top_tokens_include_ties_as_tgis(n, expected):
    scores = torch.tensor([[-1.0, -3.0, -4.0, -2.0, -3.0]])
    (top,) = logprobs.top_tokens(scores, None, torch.tensor([n]))
    assert [token for token, _ in top] == expected


def test_top_tokens_never_include_impossible_ones():
    scores = torch.tensor([[-0.5, -torch.inf, -1.0], [-1.0, -1.0, -1.0]])
    assert logprobs.top_tokens(scores, None, torch.tensor([3, 9])) == [
        [(0, -0.5), (2, -1.0)],
        [(0, -1.0), (1, -1.0), (2, -1.0)],
    ]


def test_prompt_logprobs_are_computed_in_parts(monkeypatch):
    head = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    hidden, targets = torch.randn(23, 8), torch.arange(23)
    sizes = []

    def logits_of(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part @ head

    monkeypatch.setattr(logprobs, "_MAX_ELEMENTS", 500)
    ours, top = logprobs.of_targets(logits_of, hidden, targets, 50)
    assert (sizes, top) == ([10, 10, 3], [])
    expected = (hidden @ head).log_softmax(-1)
    torch.testing.assert_close(ours, expected[torch.arange(23), targets])
    wanted = torch.arange(23) % 3
    again, top = logprobs.of_targets(logits_of, hidden, targets, 50, wanted)
    assert again.tolist() == ours.tolist()
    for place in range(23):
        best = expected[place].topk(int(wanted[place]))
        assert [token for token, _ in top[place]] == best.indices.tolist()
        assert [value for _, value in top[place]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_prompt_token_that_is_the_likeliest_has_exactly_the_log_probability_of_the_first_alternative():
    """Clients that score ask whether a text is greedy by comparing the two numbers."""
    hidden = random_logits(40, 5.0)
    best = hidden.argmax(-1)
    ours, top = logprobs.of_targets(lambda part: part, hidden, best, VOCAB, torch.ones(40, dtype=torch.int64))
    assert [tokens[0] for tokens in top] == list(zip(best.tolist(), ours.tolist(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_whose_logits_are_not_finite_is_seen_and_disturbs_nobody(bad):
    logits = random_logits(len(MIXED))
    clean = sample(logits, MIXED)
    for i in range(len(MIXED)):
        poisoned = logits.clone()
        poisoned[i, 500] = bad
        out = sample(poisoned, MIXED)
        others = [k for k in range(len(MIXED)) if k != i]
        assert not out.logprobs[i].isfinite()
        assert 0 <= out.ids[i] < VOCAB
        assert out.ids[others].tolist() == clean.ids[others].tolist()
    nothing_possible = sample(torch.full((len(MIXED), VOCAB), -torch.inf), MIXED)
    assert not nothing_possible.logprobs.isfinite().any()


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (SamplingParameters(temperature=0.0), "temperature"),
        (SamplingParameters(temperature=float("nan")), "temperature"),
        (SamplingParameters(top_p=0.0), "top_p"),
        (SamplingParameters(typical_p=1.5), "typical_p"),
        (SamplingParameters(repetition_penalty=-1.0), "repetition_penalty"),
        (SamplingParameters(frequency_penalty=2.5), "frequency_penalty"),
        (SamplingParameters(presence_penalty=-2.5), "presence_penalty"),
        (SamplingParameters(min_p=1.5), "min_p"),
        (SamplingParameters(min_p=float("nan")), "min_p"),
        (SamplingParameters(logit_bias=((3, float("inf")),)), "logit_bias"),
        (SamplingParameters(logit_bias=tuple((i, 1.0) for i in range(1025))), "logit_bias"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(parameters, name):
    with pytest.raises(RowProblem, match=f"`{name}`"):
        parameters.record()


def test_every_field_on_the_wire_is_read_and_is_off_when_absent():
    """A field that the router sends and nobody reads would be a parameter that is silently ignored."""
    off = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)
    assert sampling_parameters(pb.Admission(sampling=off)) == SamplingParameters()
    read = set()
    for field in pb.SamplingParameters.DESCRIPTOR.fields:
        message = pb.SamplingParameters(logit_bias={3: 1.0} if field.name == "logit_bias" else {})
        if field.name == "end_token_ids":
            message.end_token_ids.append(7)
        elif field.name != "logit_bias":
            setattr(message, field.name, True if field.type == field.TYPE_BOOL else 2)
        assert sampling_parameters(pb.Admission(sampling=message)) != sampling_parameters(pb.Admission()), field.name
        read.add(field.name)
    assert read == {field.name for field in dataclasses.fields(SamplingParameters)} - {"top_n"}
