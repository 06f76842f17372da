"""The hand-written method table is the service of generate.proto."""

from tgi_proto import channel, service
from tgi_proto import generate_pb2 as pb


def test_the_method_table_matches_the_proto_file() -> None:
    declared = pb.DESCRIPTOR.services_by_name["Shard"]
    assert declared.full_name == service.SERVICE
    assert {
        name: (request.DESCRIPTOR.full_name, response.DESCRIPTOR.full_name)
        for name, (request, response) in service.METHODS.items()
    } == {m.name: (m.input_type.full_name, m.output_type.full_name) for m in declared.methods}


def test_a_socket_is_the_prefix_and_the_rank() -> None:
    assert channel.socket_path("/tmp/tgi", 3) == "/tmp/tgi-3"
    assert channel.address("/tmp/tgi", 3) == "unix:/tmp/tgi-3"
