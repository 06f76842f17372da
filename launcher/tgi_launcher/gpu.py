"""Which NVIDIA GPUs the children will see, and their memory, from nvidia-smi. Never imports torch. Called by launch."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_QUERY = "index,uuid,name,memory.total,memory.free"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as nvidia-smi lists it."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int

    @property
    def card(self) -> str:
        """The name in TGI's `x-compute-type` spelling, e.g. `nvidia-h200`."""
        return self.name.lower().replace(" ", "-")


def parse_query(text: str) -> tuple[Gpu, ...]:
    """The devices in `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`. Lines it cannot read are left out."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and all(re.fullmatch(r"\d+", parts[i]) for i in (0, 3, 4)):
            gpus.append(Gpu(int(parts[0]), parts[1], parts[2], int(parts[3]) * _MIB, int(parts[4]) * _MIB))
    return tuple(gpus)


def query(timeout_s: float = 20.0) -> tuple[Gpu, ...]:
    """All devices of this machine; none when nvidia-smi is absent or fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_query(done.stdout)


def visible(gpus: tuple[Gpu, ...], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those of `gpus` that CUDA_VISIBLE_DEVICES leaves, in its order; as in CUDA, the first unknown entry ends it."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    seen = []
    for entry in (part.strip() for part in chosen.split(",")):
        matches = [g for g in gpus if entry == str(g.index) or (entry and g.uuid.startswith(entry))]
        if not matches:
            break
        seen.append(matches[0])
    return tuple(seen)


def device_count(environ: Mapping[str, str], gpus: tuple[Gpu, ...]) -> int | None:
    """TGI's count of devices, from the environment; None when it says nothing. An empty list counts as 1."""
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        value = environ.get(name)
        if value is None:
            continue
        if name == "NVIDIA_VISIBLE_DEVICES" and value in ("all", "void"):
            return max(1, len(gpus))
        return len(value.split(","))
    return None


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
