"""Choices and streams without a server: what tokens become, when a generation ends, and how a reader is woken."""

import asyncio

import pytest
from api_kit import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tgi_proto import generate_pb2 as pb
from tgi_router import stream as stream_module
from tgi_router.detokenizer import Vocabulary
from tgi_router.errors import Bug, GenerationError, IncompleteGeneration, IncompleteGenerationStream
from tgi_router.metrics import Metrics
from tgi_router.request import FinishReason, Token, ValidRequest
from tgi_router.stream import Choice, Rules, Shared, Stream
from tgi_router.validation import Validated
from tokenizers import Tokenizer

LIBRARY = Tokenizer.from_str(tiny_tokenizer())
EOS = 1
SHARED = Shared(Vocabulary(LIBRARY), frozenset({EOS}), Metrics())


def choice(
    stops: tuple[str, ...] = (), *, max_new_tokens: int = 1000, streaming: bool = True, **rules: bool
) -> tuple[Stream, Choice]:
    stream = Stream(streaming=streaming)
    request = ValidRequest((0,), max_new_tokens, pb.SamplingParameters())
    return stream, Choice(Validated(request, "x", stops, None), stream, SHARED, Rules(streaming=streaming, **rules))


def feed(one: Choice, ids: list[int]) -> FinishReason | None:
    """Gives `ids` to the sink until it ends the request."""
    for token_id in ids:
        reason = one.token(Token(token_id, -0.5))
        if reason is not None:
            return reason
    return None


async def unread(stream: Stream) -> list[stream_module.GeneratedToken]:
    return [token for _, token in await stream.next() or []]


ids = st.lists(st.integers(0, 505), max_size=30)
stops = st.lists(st.text(alphabet="aeht \ufffd", min_size=1, max_size=3), max_size=3).map(tuple)


@given(ids=ids, stops=stops, limit=st.integers(1, 30), keep=st.booleans(), ignore_eos=st.booleans())
def test_streamed_pieces_are_the_whole_text_and_end_for_the_same_reason(
    ids: list[int], stops: tuple[str, ...], limit: int, keep: bool, ignore_eos: bool
) -> None:
    options = {"max_new_tokens": limit, "keep_stop": keep, "ignore_eos": ignore_eos}
    stream, streamed = choice(stops, **options)
    _, whole = choice(stops, streaming=False, **options)
    reason = feed(streamed, ids)
    assert reason == feed(whole, ids) == whole.finish_reason
    tokens = [token for _, token in stream._unread]
    assert tokens == whole.tokens
    assert "".join(token.shown for token in tokens) == streamed.text == whole.text
    if reason is not None:
        assert streamed.last_token == tokens[-1]
        assert tokens[-1].id == ids[len(tokens) - 1]
        text = LIBRARY.decode(ids[: len(tokens)])
        assert text.startswith(whole.text)
        if reason is FinishReason.LENGTH:
            assert len(tokens) == limit
        if not (stops or keep) or reason is FinishReason.EOS_TOKEN:
            assert whole.text == text
        if reason is FinishReason.STOP_SEQUENCE and not keep:
            assert any(text.startswith(whole.text + stop) for stop in stops)
        if reason is FinishReason.STOP_SEQUENCE and keep:
            assert any(whole.text.removesuffix("\n").endswith(stop.removesuffix("\n")) for stop in stops)
    if keep:  # on TGI's routes the tokens' texts are the text; a special token's is its own, also inside a character
        pieces = "".join(token.text for token in tokens if not token.special)
        torn = "\ufffd" if tokens and tokens[-1].special and whole.text != pieces else ""
        assert pieces + torn == whole.text


def test_length_comes_before_end_of_sequence_and_that_before_a_stop_string() -> None:
    (a,) = LIBRARY.encode("a", add_special_tokens=False).ids
    assert feed(choice(max_new_tokens=1)[1], [EOS]) is FinishReason.LENGTH
    assert feed(choice(("a",), max_new_tokens=1)[1], [a]) is FinishReason.LENGTH
    assert feed(choice(("a",), max_new_tokens=1, keep_stop=False)[1], [a]) is FinishReason.STOP_SEQUENCE
    assert feed(choice()[1], [a, EOS]) is FinishReason.EOS_TOKEN
    assert feed(choice(ignore_eos=True, max_new_tokens=3)[1], [EOS] * 5) is FinishReason.LENGTH


def test_held_back_text_is_shown_when_the_generation_ends_otherwise() -> None:
    (a,) = LIBRARY.encode("a", add_special_tokens=False).ids
    stream, one = choice(("ab",), keep_stop=False)
    one.token(Token(a, -0.5))
    assert one.text == ""
    assert one.token(Token(EOS, -0.5)) is FinishReason.EOS_TOKEN
    assert one.text == "a"
    assert [token.shown for _, token in stream._unread] == ["", "a"]


async def test_a_reader_gets_what_came_together_at_once_and_none_at_the_end() -> None:
    stream, one = choice(max_new_tokens=3)
    one.token(Token(5, -0.5))
    one.token(Token(6, -0.5))
    assert [token.id for token in await unread(stream)] == [5, 6]
    reader = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    one.token(Token(7, -0.5))
    batch = await reader
    assert batch is not None
    assert [token.id for _, token in batch] == [7]
    assert await stream.next() is None


async def test_a_failure_comes_after_the_tokens_before_it() -> None:
    stream, one = choice()
    one.token(Token(5, -0.5))
    one.failed(GenerationError("x"))
    one.failed(GenerationError("a second one does not count"))
    assert len(await unread(stream)) == 1
    for _ in range(2):
        with pytest.raises(GenerationError, match="x"):
            await stream.next()


async def test_a_failure_wakes_a_reader_that_waits() -> None:
    for streaming, kind in ((True, IncompleteGenerationStream), (False, IncompleteGeneration)):
        stream, one = choice(streaming=streaming)
        reader = asyncio.create_task(stream.next() if streaming else stream.finish())
        await asyncio.sleep(0)
        one.failed(IncompleteGeneration())
        with pytest.raises(kind):
            await reader


async def test_a_whole_answer_waits_for_every_choice() -> None:
    stream, first = choice(max_new_tokens=1, streaming=False)
    second = Choice(first.validated, stream, SHARED, Rules())
    assert [first.index, second.index] == [0, 1]
    reader = asyncio.create_task(stream.finish())
    first.token(Token(5, -1.0))
    await asyncio.sleep(0)
    assert not reader.done()
    second.token(Token(5, -0.5))
    await reader
    assert max(stream.choices, key=lambda one: one.mean_logprob) is second


async def test_a_quiet_stream_returns_nothing_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_S", 0.01)
    stream, one = choice()
    assert await stream.next() == []
    assert await stream.next() == []
    one.token(Token(5, -0.5))
    assert len(await unread(stream)) == 1
    stream.close()


async def test_a_token_is_written_at_once_without_waking_the_reader_unless_it_cannot_be() -> None:
    stream, one = choice(max_new_tokens=4)
    written: list[tuple[int, bool]] = []
    room = [True, False, True, True]

    def write_now(choice: Choice, token: stream_module.GeneratedToken) -> bool:
        if room.pop(0):
            written.append((token.id, token is choice.last_token))
            return True
        return False

    stream.write_now = write_now
    reader = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    one.token(Token(5, -0.5))
    await asyncio.sleep(0)
    assert (written, reader.done()) == ([(5, False)], False)
    one.token(Token(6, -0.5))  # there is no room: it waits, and what follows it waits behind it
    one.token(Token(7, -0.5))
    batch = await reader
    assert batch is not None
    assert [token.id for _, token in batch] == [6, 7]
    one.token(Token(8, -0.5))
    assert written == [(5, False), (8, True)]
    assert await stream.next() is None


async def test_a_stream_that_is_written_at_once_is_not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_S", 0.2)
    stream, one = choice()
    stream.write_now = lambda choice, token: True
    reader = asyncio.create_task(stream.next())
    for _ in range(15):
        await asyncio.sleep(0.02)
        one.token(Token(5, -0.5))
    assert not reader.done()
    assert await reader == []
    stream.close()


async def test_too_much_unread_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_UNREAD_TOKENS", 3)
    stream, one = choice()
    stalls: list[int] = []
    stream.on_stall = lambda: stalls.append(one.num_tokens)
    feed(one, [5] * 10)
    assert stalls == [4]


def test_prompt_logprobs_that_come_in_parts_or_again_are_in_their_places() -> None:
    _, one = choice()
    one.prompt_logprobs(1, [-1.0, -2.0], [((1, -1.0),), ((2, -2.0),)])
    one.prompt_logprobs(3, [-3.0], [((3, -3.0),)])
    one.prompt_logprobs(1, [-1.0, -2.0, -3.0, -4.0], [((i, -1.0 * i),) for i in range(1, 5)])
    assert one.prompt_logprob_values == [-1.0, -2.0, -3.0, -4.0]
    assert one.prompt_top == [((i, -1.0 * i),) for i in range(1, 5)]


def test_a_mean_that_is_no_number_is_the_worst() -> None:
    _, one = choice(streaming=False)
    one.token(Token(5, float("-inf")))
    assert one.mean_logprob == float("-inf")
    _, two = choice(streaming=False)
    two.token(Token(5, float("nan")))
    assert two.mean_logprob == float("-inf")


def test_the_reason_of_a_running_choice_is_nobodys_business() -> None:
    with pytest.raises(Bug):
        _ = choice()[1].finished_for
