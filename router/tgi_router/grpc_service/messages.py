"""Messages of inference.proto ⇄ the JSON bodies and answers of REST. PURE.

A message has the field names of its REST counterpart, so nothing is listed here but what protobuf cannot say: JSON
text in fields named `…_json`, lists of lists, and null. Called by methods.py.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from tgi_proto import inference_pb2 as pb

from ..detokenizer import Vocabulary
from ..errors import ValidationError, WrongShape
from ..schemas import tgi
from ..stream import Choice, GeneratedToken

JSON_SUFFIX = "_json"
_EVENT = b"data: "


def body(message: Message, **others: Any) -> bytes:
    """The REST body that says what `message` says. others: fields that REST has beside. Raises ApiError."""
    return msgspec.json.encode(_object(message, "") | others)


def _object(message: Message, path: str) -> dict[str, Any]:
    """Fields without presence are always there, empty lists never: an empty `inputs` was given, no tools were not."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        name = field.name
        if field.has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        if name.endswith(JSON_SUFFIX):
            name = name.removesuffix(JSON_SUFFIX)
            values[name] = _parsed(value, path + field.name)
        elif isinstance(value, (str, int, float, Message)) or value:
            values[name] = _plain(value, path + name)
    return values


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Message):
        return _object(value, f"{path}.")
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
        name = path.rpartition(".")[2]
        raise ValidationError(f"`{name}` must be a 32-bit number. Given: {value}", param=name)
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{path}[{key}]") for key, item in value.items()}
    return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]


def _parsed(text: str, path: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WrongShape(f"{path}: {error}") from error


def unknown_fields(message: Message, path: str = "") -> list[str]:
    """What this version of inference.proto does not know: paths whose last part is a field's number."""
    unknown = UnknownFieldSet(message)
    found = [f"{path}{unknown[index].field_number}" for index in range(len(unknown))]
    for field, value in message.ListFields():
        if isinstance(value, Message):
            found += unknown_fields(value, f"{path}{field.name}.")
        elif field.message_type is not None and not isinstance(value, Mapping):
            for index, item in enumerate(value):
                found += unknown_fields(item, f"{path}{field.name}[{index}].")
    return found


# Answers --------------------------------------------------------------------------------------------------------------


def generated(answer: tgi.GenerateResponse) -> pb.GenerateResponse:
    """The message of a whole answer."""
    values = _json(answer)
    details = values.get("details", {})
    for sequence in (details, *details.get("best_of_sequences", ())):
        if "top_tokens" in sequence:
            sequence["top_tokens"] = [{"tokens": tokens} for tokens in sequence["top_tokens"]]
    return pb.GenerateResponse(**values)


def streamed(index: int, token: GeneratedToken, vocabulary: Vocabulary) -> pb.GenerateStreamResponse:
    """The message of one token, without what the last one has beside."""
    message = pb.GenerateStreamResponse(index=index, token=_token(token.id, token.text, token.logprob, token.special))
    for token_id, logprob in token.top:
        special = token_id in vocabulary.special_ids
        message.top_tokens.append(_token(token_id, vocabulary.text(token_id), logprob, special))
    return message


def stream_details(choice: Choice) -> pb.StreamDetails:
    """How a stream has ended."""
    return pb.StreamDetails(
        finish_reason=choice.finished_for.value,
        generated_tokens=choice.num_tokens,
        seed=choice.validated.seed,
        input_length=len(choice.validated.request.token_ids),
    )


def _token(token_id: int, text: str, logprob: float, special: bool) -> pb.Token:
    return pb.Token(id=token_id, text=text, logprob=logprob if math.isfinite(logprob) else None, special=special)


def message_of(kind: type[Any], answer: Any) -> Any:
    """The message of `kind` that says what the struct `answer` says."""
    return kind(**_said(_json(answer)))


def _said(value: Any) -> Any:
    """Without nulls: OpenAI's objects have fields that are always null here, which the messages have not."""
    if isinstance(value, dict):
        return {name: _said(item) for name, item in value.items() if item is not None}
    return [_said(item) for item in value] if isinstance(value, list) else value


def chat_pieces(events: bytes) -> Iterable[pb.ChatStreamResponse]:
    """The messages of server-sent events of a chat: none, one or several."""
    for event in events.split(b"\n\n"):
        if event.startswith(_EVENT):
            yield pb.ChatStreamResponse(**_said(msgspec.json.decode(event[len(_EVENT) :])))


def _json(answer: Any) -> Any:
    """Through JSON, because structs hold numbers as the digits that REST shows."""
    return msgspec.json.decode(msgspec.json.encode(answer))
