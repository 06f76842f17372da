"""What is generated: the same for the same request, streamed or not, alone or in a crowd, cached or not."""

import pytest
from harness import MODEL_DIR, Json, Server, together
from tokenizers import Tokenizer

PROMPT = "import os\nimport sys\n\n\ndef main(argv):\n"
GREEDY: Json = {"max_new_tokens": 24, "details": True}
SAMPLED: Json = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}
PENALIZED: Json = {**SAMPLED, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "typical_p": 0.9, "watermark": True}
KINDS = pytest.mark.parametrize("parameters", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])


def assert_same(answer: Json, expected: Json) -> None:
    """Equal texts and tokens, and log-probabilities equal but for the order of additions in other batches."""
    assert answer["generated_text"] == expected["generated_text"]
    assert [t["id"] for t in answer["details"]["tokens"]] == [t["id"] for t in expected["details"]["tokens"]]
    logprobs = [t["logprob"] for t in expected["details"]["tokens"]]
    assert [t["logprob"] for t in answer["details"]["tokens"]] == pytest.approx(logprobs, abs=1e-3)


@KINDS
def test_the_same_request_has_the_same_answer(server: Server, parameters: Json) -> None:
    first = server.generate(PROMPT, **parameters)
    assert [server.generate(PROMPT, **parameters) for _ in range(2)] == [first, first]


@KINDS
def test_streamed_equals_not_streamed(server: Server, parameters: Json) -> None:
    whole = server.generate(PROMPT, **parameters)
    events = server.generate_stream(PROMPT, **parameters)
    assert [e["token"] for e in events] == whole["details"]["tokens"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    for name in ("finish_reason", "generated_tokens", "seed"):
        assert events[-1]["details"][name] == whole["details"][name]
    visible = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert visible.removesuffix("\ufffd") == whole["generated_text"].removesuffix("\ufffd")


def test_other_seeds_have_other_answers_and_no_seed_is_random(server: Server) -> None:
    parameters = {**SAMPLED, "temperature": 1.5, "top_k": None, "top_p": None}
    texts = {server.generate(PROMPT, **{**parameters, "seed": seed})["generated_text"] for seed in range(4)}
    assert len(texts) == 4
    assert len({server.generate(PROMPT, **{**parameters, "seed": None})["generated_text"] for _ in range(3)}) > 1


def test_absent_parameters_sample_and_empty_ones_are_greedy(server: Server) -> None:
    def text(body: Json) -> str:
        with server.stream("/generate_stream", body) as stream:
            texts = []
            for event in stream.events():
                texts.append(event["token"]["text"])
                if len(texts) == 12:
                    break
        return "".join(texts)

    assert len({text({"inputs": PROMPT, "parameters": {}}) for _ in range(3)}) == 1
    assert len({text({"inputs": PROMPT}) for _ in range(3)}) > 1


def test_a_request_in_a_crowd_has_the_answer_it_has_alone(server: Server) -> None:
    prompts = [f"# file {i}\nimport os\n\n\ndef f{i}(" for i in range(12)]
    kinds = [GREEDY, {**SAMPLED, "top_n_tokens": 2}, PENALIZED]
    requests = [(prompt, {**kinds[i % 3], "max_new_tokens": 8 + 2 * i}) for i, prompt in enumerate(prompts)]
    alone = [server.generate(prompt, **parameters) for prompt, parameters in requests]
    crowd = together(lambda request: server.generate(request[0], **request[1]), requests)
    for one, other in zip(alone, crowd, strict=True):
        assert_same(other, one)


def test_a_cached_prompt_has_the_answer_of_a_cold_one_and_the_cache_is_seen(server: Server) -> None:
    prompt = "".join(f"value_{i} = {i * 7919 % 1000}\n" for i in range(40))
    cold = server.generate(prompt, **GREEDY)
    hits = server.metric("tgi_prefix_cache_hit_tokens")
    assert_same(server.generate(prompt, **GREEDY), cold)
    assert server.metric("tgi_prefix_cache_hit_tokens") >= hits + 64
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 2, "temperature": 0}).json
    usage = answer["usage"]
    assert 64 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_generated_tokens_are_cached_too(server: Server) -> None:
    first = server.generate("class Reader:\n", max_new_tokens=64, details=True)
    longer = "class Reader:\n" + first["generated_text"]
    hits = server.metric("tgi_prefix_cache_hit_tokens")
    server.generate(longer, max_new_tokens=2)
    assert server.metric("tgi_prefix_cache_hit_tokens") >= hits + 32


def test_a_stop_sequence_ends_the_text_and_stays_in_it(server: Server) -> None:
    whole = server.generate(PROMPT, max_new_tokens=40)["generated_text"]
    stop = whole[6:9]
    stopped = server.generate(PROMPT, max_new_tokens=40, stop=[stop], details=True)
    assert stopped["generated_text"].endswith(stop)
    assert whole.startswith(stopped["generated_text"])
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    events = server.generate_stream(PROMPT, max_new_tokens=40, stop=[stop])
    assert events[-1]["generated_text"] == stopped["generated_text"]


def test_max_new_tokens_is_exact(server: Server) -> None:
    details = server.generate(PROMPT, max_new_tokens=3, details=True)["details"]
    assert (details["finish_reason"], details["generated_tokens"], len(details["tokens"])) == ("length", 3, 3)


def test_truncate_keeps_the_last_tokens(server: Server) -> None:
    tokens = server.post("/tokenize", {"inputs": PROMPT}).json
    answer = server.generate(PROMPT, max_new_tokens=6, truncate=5, decoder_input_details=True)
    assert [t["id"] for t in answer["details"]["prefill"]] == [t["id"] for t in tokens[-5:]]


def test_the_full_text_is_returned_when_asked_for(server: Server) -> None:
    text = server.generate(PROMPT, max_new_tokens=5)["generated_text"]
    assert server.generate(PROMPT, max_new_tokens=5, return_full_text=True)["generated_text"] == PROMPT + text


def test_prefill_logprobs_agree_with_generated_ones(server: Server) -> None:
    answer = server.generate(PROMPT, max_new_tokens=10, details=True)
    told = server.generate(PROMPT + answer["generated_text"], max_new_tokens=1, decoder_input_details=True)
    generated = answer["details"]["tokens"]
    echoed = told["details"]["prefill"][-len(generated) :]
    assert [t["id"] for t in echoed] == [t["id"] for t in generated]
    assert [t["logprob"] for t in echoed] == pytest.approx([t["logprob"] for t in generated], abs=2e-3)


def test_best_of_keeps_the_most_likely(server: Server) -> None:
    details = server.generate(PROMPT, max_new_tokens=8, best_of=2, do_sample=True, details=True)["details"]
    chosen = details["tokens"]
    for other in details["best_of_sequences"]:
        rest = other["tokens"]
        assert sum(t["logprob"] for t in chosen) / len(chosen) >= sum(t["logprob"] for t in rest) / len(rest)


@pytest.mark.parametrize("seed", range(4))
def test_the_text_is_what_the_tokenizer_makes_of_all_tokens_at_once(server: Server, seed: int) -> None:
    """At such a temperature tokens are torn characters and worse; pieces and whole still agree with the tokenizer."""
    parameters = {"max_new_tokens": 60, "do_sample": True, "temperature": 8.0, "seed": seed, "details": True}
    prompt = "# déjà vu — 日本語 🙂👩‍👩‍👧 ключ\n"
    events = server.generate_stream(prompt, **parameters)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    expected = tokenizer.decode([e["token"]["id"] for e in events], skip_special_tokens=True)
    assert events[-1]["generated_text"] == expected
    pieces = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    torn = "\ufffd" if events[-1]["token"]["special"] and pieces != expected else ""  # the end came inside a character
    assert pieces + torn == expected
    assert server.generate(prompt, **parameters)["generated_text"] == expected
