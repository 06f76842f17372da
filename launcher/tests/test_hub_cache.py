"""From a model id to a directory without a network: local directories, the Hub's cache, overrides, conversion."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tgi_launcher import hub
from tgi_launcher.errors import ArgumentValidation, DownloadError
from tgi_launcher.flags import Flags

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_snapshot(cache: Path, *names: str, revision: str = "main") -> Path:
    folder = cache / "models--org--tiny"
    directory = folder / "snapshots" / COMMIT
    directory.mkdir(parents=True)
    (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_text("{}")
    return directory


# -- ids


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert hub.local_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model_id", ["./nowhere", "/no/where", "~/nowhere/at/all", "../nowhere"])
def test_what_looks_like_a_path_and_is_none_is_named(model_id: str) -> None:
    with pytest.raises(ArgumentValidation, match="there is no such directory"):
        hub.local_directory(model_id)


def test_a_file_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path, "model.gguf"))
    with pytest.raises(ArgumentValidation, match="no such directory"):
        hub.local_directory("model.gguf")


@pytest.mark.parametrize("model_id", ["gpt2", "org/name", "org/na-me_1.0"])
def test_ids_of_the_hub_are_recognised(model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.local_directory(model_id) is None


@pytest.mark.parametrize("model_id", ["a/b/c", "a b", "org/", "org/../x", "https://huggingface.co/a/b"])
def test_what_is_neither_is_refused(model_id: str) -> None:
    with pytest.raises(ArgumentValidation, match="neither a directory nor an id on the Hub"):
        hub.local_directory(model_id)


# -- settings


@pytest.mark.parametrize(
    ("environ", "cache"),
    [
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/data"}, "/data/hub"),
        ({"HF_HOME": "/data", "HF_HUB_CACHE": "/c"}, "/c"),
    ],
)
def test_the_cache_is_where_the_hub_has_it(environ: dict[str, str], cache: str) -> None:
    assert str(hub.hub_settings(Flags(), environ).cache) == cache


def test_the_flag_beats_hf_hub_cache_beats_its_older_name() -> None:
    environ = {"HF_HUB_CACHE": "/new", "HF_HOME": "/home"}
    by_flag = Flags(huggingface_hub_cache="/flag", sources={"huggingface_hub_cache": "flag"})
    by_variable = Flags(huggingface_hub_cache="/old", sources={"huggingface_hub_cache": "env"})
    assert str(hub.hub_settings(by_flag, environ).cache) == "/flag"
    assert str(hub.hub_settings(by_variable, environ).cache) == "/new"
    assert str(hub.hub_settings(by_variable, {"HF_HOME": "/home"}).cache) == "/old"


def test_tgis_token_beats_the_hubs_beats_the_oldest() -> None:
    names = ["HUGGING_FACE_HUB_TOKEN", "HF_TOKEN", "HF_API_TOKEN"]
    environ: dict[str, str] = {}
    assert hub.hub_settings(Flags(), {"HF_TOKEN": " "}).token is None
    for name in names:
        environ[name] = name
        assert hub.hub_settings(Flags(), environ).token == name


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_both_variables_mean_offline(value: str) -> None:
    assert hub.hub_settings(Flags(), {"HF_HUB_OFFLINE": value}).offline
    assert hub.hub_settings(Flags(), {"TRANSFORMERS_OFFLINE": value}).offline
    assert not hub.hub_settings(Flags(), {"HF_HUB_OFFLINE": "0"}).offline


# -- the cache


def test_a_complete_snapshot_is_found_by_branch_and_by_commit(tmp_path: Path) -> None:
    directory = make_snapshot(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    assert hub.find_cached(tmp_path, "org/tiny", "main") == hub.Found(directory, COMMIT, ())
    assert hub.find_cached(tmp_path, "org/tiny", COMMIT) == hub.Found(directory, COMMIT, ())


def test_a_ref_with_a_slash_is_found(tmp_path: Path) -> None:
    make_snapshot(tmp_path, "config.json", "tokenizer.json", "model.safetensors", revision="refs/pr/2")
    assert hub.find_cached(tmp_path, "org/tiny", "refs/pr/2").missing == ()


def test_an_empty_cache_lacks_everything(tmp_path: Path) -> None:
    assert hub.find_cached(tmp_path, "org/tiny", "main").missing == ("config.json", "tokenizer.json", "*.safetensors")
    assert hub.find_cached(tmp_path, "org/tiny", "main", need_weights=False).missing == (
        "config.json",
        "tokenizer.json",
    )


def test_a_damaged_ref_is_no_commit(tmp_path: Path) -> None:
    make_snapshot(tmp_path, "config.json")
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("../../etc")
    assert hub.find_cached(tmp_path, "org/tiny", "main").directory is None


def test_missing_parts_are_named_file_by_file(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    touch(tmp_path, "config.json", "model-00001-of-00002.safetensors")
    assert hub.missing_files(tmp_path) == ["tokenizer.json", "model-00002-of-00002.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.missing_files(tmp_path) == ["tokenizer.json", "model-00002-of-00002.safetensors"]
    touch(tmp_path, "tokenizer.json", "model-00002-of-00002.safetensors")
    assert hub.missing_files(tmp_path) == []


def test_a_link_to_a_blob_that_is_gone_is_missing(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "tokenizer.json")
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    assert hub.missing_files(tmp_path) == ["*.safetensors"]


def test_adapters_and_training_states_are_no_weights(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "tokenizer.json", "adapter_model.safetensors", "training_args.bin", "optimizer.bin")
    assert hub.missing_files(tmp_path) == ["*.safetensors"]


def test_pytorch_files_complete_a_model_and_ask_for_conversion(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "tokenizer.json", "pytorch_model.bin")
    assert hub.missing_files(tmp_path) == []
    assert hub.needs_conversion(tmp_path)
    touch(tmp_path, "model.safetensors")
    assert not hub.needs_conversion(tmp_path)


def test_offline_errors_name_the_mode_the_place_and_the_files(tmp_path: Path) -> None:
    settings = hub.HubSettings(tmp_path, True, "https://huggingface.co", None)
    error = hub.offline_error("org/tiny", "main", hub.Found(None, None, ("config.json",)), settings)
    assert isinstance(error, DownloadError)
    assert "HF_HUB_OFFLINE" in error.sentence
    assert str(tmp_path) in error.sentence
    assert "`config.json` of `org/tiny`" in error.sentence


# -- which files to fetch


def test_configuration_comes_first_then_one_format_of_weights() -> None:
    names = [
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "other.safetensors",
        "config.json",
        "tokenizer.model",
        "tokenizer.json",
        "additional_chat_templates/rag.jinja",
        "original/params.json",
        "README.md",
        "modeling.py",
    ]
    assert hub.wanted_files(names) == [
        "additional_chat_templates/rag.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert "modeling.py" in hub.wanted_files(names, remote_code=True)
    assert hub.wanted_files(["config.json", "weights.bin"]) == ["config.json", "weights.bin"]
    assert hub.wanted_files(["config.json"]) == ["config.json"]


# -- through the launcher


def test_a_directory_without_a_config_is_refused_by_name(model_dir: Path, launch: Callable[..., Any]) -> None:
    (model_dir / "config.json").unlink()
    run = launch()
    assert run.ends() == 1
    assert f"the model directory {model_dir} lacks `config.json`" in run.errors[-1]


def test_a_local_directory_is_served_without_any_connection(model_dir: Path, launch: Callable[..., Any]) -> None:
    run = launch(HF_ENDPOINT="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    run.wait_for("Try: curl")
    assert "download" not in run.output
    assert run.stop() == 0


def test_pytorch_weights_are_converted_once(model_dir: Path, tmp_path: Path, launch: Callable[..., Any]) -> None:
    weights = tmp_path / "prepared.safetensors"
    (model_dir / "model.safetensors").rename(weights)
    (model_dir / "pytorch_model.bin").write_bytes(b"pickles")
    first = launch(FAKE_WEIGHTS=str(weights))
    first.wait_for("Starting convert: ")
    first.wait_for("Try: curl")
    assert first.stop() == 0
    assert (model_dir / "model.safetensors").is_file()
    again = launch(FAKE_WEIGHTS="/nowhere")
    again.wait_for("Try: curl")
    assert "Starting convert" not in again.output
    assert again.stop() == 0


def test_a_conversion_that_fails_ends_the_launch(model_dir: Path, launch: Callable[..., Any]) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    run = launch(FAKE_WEIGHTS="/nowhere")
    assert run.ends() == 1
    assert "DownloadError" in run.errors[-1]
    assert "FileNotFoundError" in run.errors[-1]


def test_weights_can_come_from_another_directory(model_dir: Path, tmp_path: Path, launch: Callable[..., Any]) -> None:
    other = tmp_path / "weights"
    other.mkdir()
    (model_dir / "model.safetensors").rename(other / "model.safetensors")
    run = launch("--weights-cache-override", str(other))
    run.wait_for("Try: curl")
    (line,) = [line for line in run.lines if "Starting shard-0" in line]
    view = Path(line.partition("--model-dir ")[2].split()[0])
    assert sorted(os.listdir(view)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (view / "model.safetensors").resolve() == other / "model.safetensors"
    assert run.stop() == 0
    assert not view.exists()


def test_a_weights_override_that_does_not_exist_is_refused(launch: Callable[..., Any]) -> None:
    run = launch("--weights-cache-override", "/no/where")
    assert run.ends() == 1
    assert "`weights_cache_override` is '/no/where'" in run.errors[-1]


def test_read_only_pytorch_weights_are_converted_for_this_run(
    model_dir: Path, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere, so nothing is read-only")
    weights = tmp_path / "prepared.safetensors"
    (model_dir / "model.safetensors").rename(weights)
    (model_dir / "pytorch_model.bin").write_bytes(b"pickles")
    model_dir.chmod(0o555)
    run = launch(FAKE_WEIGHTS=str(weights))
    run.wait_for("the converted weights are kept for this run only")
    run.wait_for("Try: curl")
    assert run.stop() == 0
