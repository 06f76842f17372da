"""The report of `--env`: what people are asked for when they report a problem. Starts `nvidia-smi` if it is there."""

import platform
import shutil
import subprocess
from collections.abc import Mapping

from .memory_fit import gib
from .resources import Machine, cpu_flags, shm_bytes

_PACKAGES = (
    "text-generation-inference",
    "torch",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "aiohttp",
    "grpcio",
    "protobuf",
    "transformers",
)
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16")


def package_version(name: str) -> str:
    """Installed version of a distribution, without importing it."""
    from importlib import metadata  # not at the top: it imports half of the standard library

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def tool_output(program: str) -> str:
    """What `program` prints, or N/A."""
    if shutil.which(program) is None:
        return "N/A"
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"N/A ({error})"
    return done.stdout.rstrip() or "N/A"


def report(machine: Machine, environ: Mapping[str, str]) -> str:
    """The report, several lines. Names of TGI's lines are kept where there is something to say."""
    flags = cpu_flags()
    memory, shm = machine.memory, shm_bytes()
    lines = [
        "Runtime environment:",
        f"Target: {platform.machine()}-{platform.system().lower()}",
        f"Python version: {platform.python_version()}",
        f"Commit sha: {environ.get('GIT_SHA', 'N/A')}",
        f"Docker label: {environ.get('DOCKER_LABEL', 'N/A')}",
        *(f"{name}: {package_version(name)}" for name in _PACKAGES),
        f"CPU: {machine.cores} usable cores, {' '.join(flag for flag in _FLAGS if flag in flags) or 'flags unknown'}",
        f"Memory: {gib(memory.free)} of {gib(memory.limit)} free (limited by the {memory.limited_by})",
        f"/dev/shm: {'absent' if shm is None else gib(shm)}",
        f"nvidia-smi:\n{tool_output('nvidia-smi')}",
    ]
    return "\n".join(lines)
