"""What each method of tgi.inference.v1.Inference does: the same as the REST route it names, with the route's own code.

A message becomes the route's body (messages.py) and is decoded by the route's decoder; prompts, answers and chunks are
made by the route's functions. So everything that a route learns, its gRPC method knows, too. Used by listening.py.
"""

import msgspec
from google.protobuf.message import Message
from tgi_proto import inference_pb2 as pb

from ..bodies import decode
from ..infer import Call
from ..openai_requests import Understood, prepare
from ..parameters import GenerateParameters
from ..routes import chat
from ..routes.generate import whole_answer
from ..routes.info import facts
from ..schemas import openai, tgi
from ..server import Server
from ..stream import Rules
from ..validation import Prompt
from . import messages
from .calls import Writer

_generate_decoder = msgspec.json.Decoder(tgi.GenerateRequest)


class Methods:
    """One per server. Named as in inference.proto, in Python's spelling."""

    def __init__(self, server: Server) -> None:
        self._server = server

    # Generate

    async def generate(self, request: pb.GenerateRequest, call: Call) -> Message:
        """See POST /generate."""
        server = self._server
        inputs, parameters = self._asked(request)
        copies = parameters.best_of or 1
        async with server.infer.open([Prompt(inputs, parameters)], Rules(), call, copies=copies) as stream:
            await stream.finish()
        return messages.generated(whole_answer(server, inputs, parameters, stream.choices))

    async def generate_stream(self, request: pb.GenerateRequest, call: Call, writer: Writer) -> None:
        """See POST /generate_stream."""
        server = self._server
        inputs, parameters = self._asked(request)
        vocabulary = server.tokenizer.vocabulary
        index = 0
        async with server.infer.open([Prompt(inputs, parameters)], Rules(streaming=True), call) as stream:
            stream.on_stall = writer.stall
            while (batch := await stream.next()) is not None:
                for choice, token in batch:
                    index += 1
                    message = messages.streamed(index, token, vocabulary)
                    if token is choice.last_token:
                        message.generated_text = (inputs if parameters.return_full_text else "") + choice.text
                        if parameters.details:
                            message.details.CopyFrom(messages.stream_details(choice))
                    await writer.write(message)

    def _asked(self, request: pb.GenerateRequest) -> tuple[str, GenerateParameters]:
        body = decode(messages.body(request), _generate_decoder)
        self._server.metrics.request_count.inc()
        return body.inputs, body.given_parameters()

    # Chat

    async def chat(self, request: pb.ChatRequest, call: Call) -> Message:
        """See POST /v1/chat/completions."""
        answer, opened = chat.begin_answer(self._understood(request, call, streams=False))
        async with opened as stream:
            await stream.finish()
        message: Message = messages.message_of(pb.ChatResponse, answer.whole(stream.choices))
        return message

    async def chat_stream(self, request: pb.ChatRequest, call: Call, writer: Writer) -> None:
        """See POST /v1/chat/completions with `stream`."""
        answer, opened = chat.begin_answer(self._understood(request, call, streams=True))
        async with opened as stream:
            stream.on_stall = writer.stall
            while (batch := await stream.next()) is not None:
                for choice, token in batch:
                    for message in messages.chat_pieces(answer.render(choice, token)):
                        await writer.write(message)
            for message in messages.chat_pieces(answer.last(stream.choices)):
                await writer.write(message)

    def _understood(self, request: pb.ChatRequest, call: Call, *, streams: bool) -> Understood[openai.ChatRequest]:
        self._server.metrics.request_count.inc()
        data = messages.body(request, stream=streams)
        return prepare(self._server, decode(data, chat.decoder), data, call, chat.prompts)

    # Tokenize and Info

    async def tokenize(self, request: pb.TokenizeRequest, call: Call) -> Message:
        """See POST /tokenize."""
        tokenizer = self._server.tokenizer

        def work() -> pb.TokenizeResponse:  # on a worker thread: a long text makes millions of objects
            tokens = tokenizer.tokens(request.inputs, add_special_tokens=True)
            return pb.TokenizeResponse(
                tokens=[pb.SimpleToken(id=one.id, text=one.text, start=one.start, stop=one.stop) for one in tokens]
            )

        return await tokenizer.run(work)

    async def info(self, request: pb.InfoRequest, call: Call) -> Message:
        """See GET /info."""
        message: Message = messages.message_of(pb.InfoResponse, facts(self._server))
        return message
