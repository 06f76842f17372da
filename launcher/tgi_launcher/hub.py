"""Model id → directory on this machine, without any network: local directories and the Hub's cache.

Knows the cache's layout (`models--org--name/{refs,snapshots,blobs}`) and which files of a repository a model needs.
What is missing is fetched by `download.py` in a process of its own; huggingface_hub is never imported here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ArgumentValidation, DownloadError
from .facts import is_weight_name, read_json
from .flags import Flags

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_TEXT_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|params)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.jinja|[\w.-]+\.model|[\w.-]+\.tiktoken"
    r"|additional_chat_templates/[\w.-]+\.jinja"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The Hub's environment variables, resolved."""

    cache: Path
    offline: bool
    endpoint: str
    token: str | None  # None: huggingface_hub looks into its token file


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model lies. `missing`: files that must be fetched (names, or patterns while the list is not known)."""

    directory: Path | None
    commit: str | None
    missing: tuple[str, ...]


def hub_settings(flags: Flags, environ: Mapping[str, str]) -> HubSettings:
    """A flag beats HF_HUB_CACHE beats HUGGINGFACE_HUB_CACHE beats HF_HOME/hub; TGI's HF_API_TOKEN beats HF_TOKEN."""
    home = Path(environ.get("HOME") or "~").expanduser()
    xdg = environ.get("XDG_CACHE_HOME")
    hf_home = environ.get("HF_HOME") or f"{xdg or home / '.cache'}/huggingface"
    from_flag = flags.huggingface_hub_cache if flags.sources.get("huggingface_hub_cache") == "flag" else None
    cache = (
        from_flag or environ.get("HF_HUB_CACHE") or flags.huggingface_hub_cache or f"{Path(hf_home).expanduser()}/hub"
    )
    tokens = (environ.get(name) for name in ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return HubSettings(
        cache=Path(cache).expanduser(),
        offline=any(_is_true(environ.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
        endpoint=(environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        token=next((token.strip() for token in tokens if token and token.strip()), None),
    )


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def local_directory(model_id: str) -> Path | None:
    """The directory when `model_id` is one. Raises ArgumentValidation when it looks like a path and is none."""
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path.resolve()
    if model_id.startswith(("/", ".", "~")) or path.exists():
        raise ArgumentValidation(f"`model_id` is '{model_id}', but there is no such directory")
    if not _REPO_ID.fullmatch(model_id) or ".." in model_id:
        raise ArgumentValidation(f"`model_id` is '{model_id}': neither a directory nor an id on the Hub (org/name)")
    return None


def repo_folder(cache: Path, model_id: str) -> Path:
    """The folder of a model repository in the cache."""
    return cache / ("models--" + model_id.replace("/", "--"))


def cached_commit(folder: Path, revision: str) -> str | None:
    """The commit that `revision` names in the cache."""
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def find_cached(cache: Path, model_id: str, revision: str, *, need_weights: bool = True) -> Found:
    """What the cache holds of a model."""
    folder = repo_folder(cache, model_id)
    commit = cached_commit(folder, revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return Found(None, commit, ("config.json", "tokenizer.json", *(("*.safetensors",) if need_weights else ())))
    directory = folder / "snapshots" / commit
    return Found(directory, commit, tuple(missing_files(directory, need_weights=need_weights)))


def missing_files(directory: Path, *, need_weights: bool = True) -> list[str]:
    """Names of files without which the model in `directory` cannot be served; [] when it is complete."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        missing.append("tokenizer.json")
    if need_weights:
        safetensors = missing_weights(directory, "model.safetensors", "safetensors")
        if safetensors:
            binaries = missing_weights(directory, "pytorch_model.bin", "bin")
            missing += safetensors if binaries else []
    return missing


def missing_weights(directory: Path, single: str, suffix: str) -> list[str]:
    """Missing weight files of one format: by the index, else by the numbers in the files' names."""
    index = directory / f"{single}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        return [name for name in names if not (directory / name).is_file()]
    if (directory / single).is_file():
        return []
    present = [path.name for path in directory.glob(f"*.{suffix}") if path.is_file() and is_weight_name(path.name)]
    expected = set(present)
    for name in present:
        if match := _SHARD_NAME.fullmatch(name):
            stem, count = match[1], int(match[3])
            expected |= {f"{stem}-{i:05}-of-{count:05}.{suffix}" for i in range(1, count + 1)}
    return sorted(expected - set(present)) if present else [f"*.{suffix}"]


def needs_conversion(directory: Path) -> bool:
    """Whether the weights lie there only as PyTorch files."""
    if not missing_weights(directory, "model.safetensors", "safetensors"):
        return False
    return not missing_weights(directory, "pytorch_model.bin", "bin")


def wanted_files(names: Iterable[str], *, weights: bool = True, remote_code: bool = False) -> list[str]:
    """Which files of a repository to fetch, in order: small ones first, then safetensors, else PyTorch files."""
    names = sorted(names)
    small = [n for n in names if _TEXT_FILES.fullmatch(n) or (remote_code and n.endswith(".py"))]
    if not weights:
        return small
    for single, suffix in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")):
        found = [n for n in names if n.endswith(f".{suffix}") and "/" not in n and is_weight_name(n)]
        standard = [n for n in found if n == single or n.startswith(single.removesuffix(f".{suffix}") + "-")]
        if found:
            index = [f"{single}.index.json"] if f"{single}.index.json" in names else []
            return small + index + (standard or found)
    return small


def offline_error(model_id: str, revision: str, found: Found, settings: HubSettings) -> DownloadError:
    """Says what the cache lacks."""
    missing = ", ".join(f"`{name}`" for name in found.missing)
    return DownloadError(
        f"offline mode is on (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE) and the cache {settings.cache} lacks {missing} "
        f"of `{model_id}` at revision '{revision}': download it once with a connection, or give a local directory"
    )


def with_weights_from(directory: Path, weights: Path, view: Path) -> Path:
    """A directory `view` of links: configuration from `directory`, weight files from `weights`."""
    view.mkdir(parents=True)
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".safetensors", ".bin") and not path.name.endswith(".index.json"):
            (view / path.name).symlink_to(path.resolve())
    for path in sorted(weights.iterdir()):
        if path.is_file() and not (view / path.name).exists():
            (view / path.name).symlink_to(path.resolve())
    return view
