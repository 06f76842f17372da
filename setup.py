"""Generates the protobuf code on the way to a build, an editable install included. Everything else: pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTOS = ROOT / "proto"
PACKAGE = PROTOS / "tgi_proto"


def generate() -> None:
    """Writes `*_pb2.py` and `*_pb2.pyi` beside the hand-written modules of `tgi_proto`.

    The public service has stubs for its clients, too. Its file is registered as tgi_proto/inference.proto: two files of
    the same name cannot live in one process, and a client may have an inference.proto of its own.
    """
    _protoc("generate.proto", f"--proto_path={PROTOS}", f"--python_out={PACKAGE}", f"--pyi_out={PACKAGE}")
    outputs = [f"--{kind}_out={PROTOS}" for kind in ("python", "pyi", "grpc_python")]
    _protoc("tgi_proto/inference.proto", f"--proto_path=tgi_proto={PROTOS}", *outputs)


def _protoc(name: str, *arguments: str) -> None:
    from grpc_tools import protoc  # type: ignore[import-untyped]

    if protoc.main(["protoc", *arguments, name]) != 0:
        raise SystemExit(f"protoc failed on {name}")


class BuildPy(build_py):
    def run(self) -> None:
        generate()
        super().run()


setup(cmdclass={"build_py": BuildPy})
