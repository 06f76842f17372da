"""A gRPC client that knows nothing but reflection, as grpcurl does: no generated code, none of our packages."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

Json = dict[str, Any]
SERVICE = "tgi.inference.v1.Inference"


class Client:
    """One channel. Requests and answers are JSON objects."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> list[str]:
        return list(self._database.get_services())

    def methods(self, service: str) -> list[str]:
        return [method.name for method in self._pool.FindServiceByName(service).methods]

    def call(self, name: str, request: Json, service: str = SERVICE, timeout_s: float = 120.0) -> Any:
        """The call itself: of a streaming method an iterator of messages, else the message."""
        method = self._pool.FindServiceByName(service).methods_by_name[name]
        kind = GetMessageClass(method.input_type)
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        send = make(
            f"/{service}/{name}",
            request_serializer=kind.SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return send(ParseDict(request, kind()), timeout=timeout_s)

    def whole(self, name: str, request: Json, service: str = SERVICE) -> Json:
        return plain(self.call(name, request, service))

    def stream(self, name: str, request: Json) -> Iterator[Json]:
        return (plain(message) for message in self.call(name, request))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plain(message: Any) -> Json:
    result: Json = MessageToDict(message, preserving_proto_field_name=True)
    return result


def run_grpcurl(command: str, target: str) -> list[Json] | list[str]:
    """What the command line `command` of grpcurl answers. Knows the options of docs/grpc.md."""
    words = shlex.split(command)
    assert words.pop(0) == "grpcurl"
    request: Json = {}
    while words[0].startswith("-"):
        option = words.pop(0)
        if option == "-d":
            request = json.loads(words.pop(0))
        else:
            assert option == "-plaintext", option
    assert words.pop(0) == "localhost:50051"
    with Client(target) as client:
        if words[0] == "list":
            return client.services()
        if words[0] == "describe":
            return client.methods(words[1])
        service, _, method = words[0].partition("/")
        answer = client.call(method, request, service)
        return [plain(message) for message in answer] if hasattr(answer, "__next__") else [plain(answer)]
