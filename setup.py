"""Generates the protobuf code on the way to a build, an editable install included. Everything else: pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTOS = ("generate.proto",)
PACKAGE = ROOT / "proto" / "tgi_proto"


def generate() -> None:
    """Writes `*_pb2.py` and `*_pb2.pyi` beside the hand-written modules of `tgi_proto`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    for name in PROTOS:
        arguments = ["protoc", f"--proto_path={ROOT / 'proto'}", f"--python_out={PACKAGE}", f"--pyi_out={PACKAGE}"]
        if protoc.main([*arguments, name]) != 0:
            raise SystemExit(f"protoc failed on proto/{name}")


class BuildPy(build_py):
    def run(self) -> None:
        generate()
        super().run()


setup(cmdclass={"build_py": BuildPy})
