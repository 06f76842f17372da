"""The gRPC port: key, TLS, reflection as grpcurl uses it, start and end, and nothing of it when it is off."""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from api_kit import Api
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_kit import address, client, failure, free_port, serving
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tgi_proto import inference_pb2 as pb
from tgi_proto import inference_pb2_grpc
from tgi_router.errors import StartupError

SERVICE = "tgi.inference.v1.Inference"
SMALL = pb.GenerateRequest(inputs="hello", parameters=pb.GenerateParameters(max_new_tokens=3))
KEY = "sesame"


# Key ------------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def locked(tmp_path: Path) -> AsyncIterator[Api]:
    file = tmp_path / "key"
    file.write_text(KEY)
    async with serving(api_key_file=str(file)) as api:
        yield api


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer SESAME", "Basic sesame", "sesame", "Bearer "])
async def test_without_the_key_nothing_but_health_is_answered(
    given: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    metadata = () if given is None else (("authorization", given),)
    async with locked(tmp_path) as api, grpc.aio.insecure_channel(address(api)) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        calls = [
            stub.Generate(SMALL, metadata=metadata),
            stub.GenerateStream(SMALL, metadata=metadata),
            stub.Chat(pb.ChatRequest(), metadata=metadata),
            stub.ChatStream(pb.ChatRequest(), metadata=metadata),
            stub.Tokenize(pb.TokenizeRequest(inputs="x"), metadata=metadata),
            stub.Info(pb.InfoRequest(), metadata=metadata),
            reflection.ServerReflectionInfo(iter([question]), metadata=metadata),
        ]
        for call in calls:
            error, trailing = await failure(call)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert trailing["error_type"] == "authentication"
            assert KEY not in error.details()
        lines = [vars(record) for record in caplog.records if record.message.startswith("Refused: ")]
        assert sorted(line["path"].rpartition("/")[2] for line in lines) == sorted(
            ["Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Info", "ServerReflectionInfo"]
        )
        assert api.server.metrics.request_count.get() == 0
        well = health_pb2_grpc.HealthStub(channel)
        assert (await well.Check(health_pb2.HealthCheckRequest(), metadata=metadata)).status == 1


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}"])
async def test_with_the_key_everything_is_answered(given: str, tmp_path: Path) -> None:
    async with locked(tmp_path) as api, client(api) as stub:
        metadata = (("authorization", given),)
        assert (await stub.Generate(SMALL, metadata=metadata)).generated_text
        assert [message.index async for message in stub.GenerateStream(SMALL, metadata=metadata)] == [1, 2, 3]


# TLS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_pair(authority: trustme.CA, folder: Path) -> dict[str, str]:
    """The flags of a server whose certificate is for 127.0.0.1."""
    pair = authority.issue_cert("127.0.0.1")
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    key.write_bytes(pair.private_key_pem.bytes())
    return {"grpc_tls_cert": str(cert), "grpc_tls_key": str(key)}


async def test_with_tls_only_a_client_that_trusts_the_certificate_gets_through(
    authority: trustme.CA, tmp_path: Path
) -> None:
    async with serving(**write_pair(authority, tmp_path)) as api:
        trusting = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        async with grpc.aio.secure_channel(address(api), trusting) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert [message.index async for message in stub.GenerateStream(SMALL)] == [1, 2, 3]
        stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        async with grpc.aio.secure_channel(address(api), stranger) as channel:
            error, _ = await failure(inference_pb2_grpc.InferenceStub(channel).Generate(SMALL, timeout=20))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        async with client(api) as plain:
            error, _ = await failure(plain.Generate(SMALL, timeout=20))
            assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("wrong", ["another's key", "no key", "no file"])
async def test_files_that_are_no_certificate_and_its_key_are_an_error_at_start(
    wrong: str, authority: trustme.CA, tmp_path: Path
) -> None:
    flags = write_pair(authority, tmp_path)
    if wrong == "no file":
        flags["grpc_tls_key"] = str(tmp_path / "none")
    else:
        other = authority.issue_cert("other").private_key_pem.bytes()
        (tmp_path / "key.pem").write_bytes(other if wrong == "another's key" else b"nonsense")
    with pytest.raises(StartupError, match=r"`--grpc-tls-cert` .* `--grpc-tls-key` .* (no pair|cannot be read): "):
        async with serving(**flags):
            pass


async def test_a_renewed_certificate_is_used_without_a_restart_and_a_broken_one_is_not(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def reach(trusted: trustme.CA) -> grpc.StatusCode:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection, and a handshake, of its own
        trusting = grpc.ssl_channel_credentials(trusted.cert_pem.bytes())
        async with grpc.aio.secure_channel(address(api), trusting, options=options) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Info(pb.InfoRequest(), timeout=20)
            return await call.code()

    other = trustme.CA()
    async with serving(**write_pair(authority, tmp_path)) as api:
        assert await reach(authority) is grpc.StatusCode.OK
        write_pair(other, tmp_path)
        assert await reach(other) is grpc.StatusCode.OK
        assert await reach(authority) is grpc.StatusCode.UNAVAILABLE
        assert "The gRPC port has a new certificate" in caplog.text
        (tmp_path / "key.pem").write_text("nonsense")
        assert await reach(other) is grpc.StatusCode.OK
        assert "goes on with its old certificate" in caplog.text


async def test_a_compressed_message_is_refused_before_it_is_unpacked() -> None:
    """It is measured as it comes: a few kilobytes could become gigabytes."""
    async with serving() as api, client(api) as stub:
        error, _ = await failure(stub.Generate(SMALL, compression=grpc.Compression.Gzip))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await stub.Generate(SMALL)).generated_text


async def test_a_taken_port_is_an_error_at_start_and_not_shared() -> None:
    async with serving() as api:
        with pytest.raises(StartupError, match=f"`--grpc-port` {api.server.config.grpc_port} of 127.0.0.1"):
            async with serving(grpc_port=api.server.config.grpc_port):
                pass


# Reflection, as grpcurl uses it: no .proto file at hand ---------------------------------------------------------------


def describe_and_call(target: str) -> dict[str, Any]:
    """grpcurl's list, describe and call."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        service = pool.FindServiceByName(SERVICE)
        answers: dict[str, Any] = {"list": list(database.get_services()), "methods": [m.name for m in service.methods]}
        for name, request in (
            ("Generate", {"inputs": "hello", "parameters": {"max_new_tokens": 3, "details": True}}),
            ("GenerateStream", {"inputs": "hello", "parameters": {"max_new_tokens": 3}}),
            ("ChatStream", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}),
            ("Info", {}),
        ):
            method = service.methods_by_name[name]
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = make(
                f"/{SERVICE}/{name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            answer = call(ParseDict(request, GetMessageClass(method.input_type)()))
            several = list(answer) if method.server_streaming else [answer]
            answers[name] = [MessageToDict(one, preserving_proto_field_name=True) for one in several]
        return answers


async def test_a_client_without_the_proto_file_can_list_describe_and_call() -> None:
    async with serving() as api:
        answers = await asyncio.to_thread(describe_and_call, address(api))
        assert sorted(answers["list"]) == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            SERVICE,
        ]
        assert answers["methods"] == ["Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Info"]
        text = api.expected_text("hello", 3)
        assert answers["Generate"][0]["generated_text"] == text
        assert len(answers["Generate"][0]["details"]["tokens"]) == 3
        assert answers["GenerateStream"][-1]["generated_text"] == text
        assert len(answers["ChatStream"]) == 3
        assert answers["Info"][0]["model_id"] == "tiny"


async def test_reflection_answers_under_its_newer_name_too() -> None:
    async with serving() as api, grpc.aio.insecure_channel(address(api)) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        questions = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
        ]
        listed, described, unknown = [answer async for answer in ask(iter(questions))]
        assert SERVICE in [service.name for service in listed.list_services_response.service]
        assert len(described.file_descriptor_response.file_descriptor_proto) == 1
        assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


# Off ------------------------------------------------------------------------------------------------------------------


def test_a_router_without_the_port_imports_nothing_of_it() -> None:
    code = (
        "import sys, tgi_router.cli\n"
        "names = ('tgi_router.grpc_service', 'grpc_health.v1', 'grpc_reflection.v1alpha', 'tgi_proto.inference_pb2')\n"
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


async def test_the_port_is_free_again_when_the_server_has_ended() -> None:
    port = free_port()
    for _ in range(2):
        async with serving(grpc_port=port) as api, client(api) as stub:
            assert (await stub.Info(pb.InfoRequest())).model_id == "tiny"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
