"""Where the shard's tests compute: on CPU, or with `--device cuda` on a GPU (`make gpu-check`).

A test that takes the `device` fixture runs on both; one marked `gpu` only on a GPU; the others only on CPU. On CPU
Triton's kernels run in its interpreter, which has to be chosen before they are imported.
"""

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the shard's tests compute")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        pytest.exit("no CUDA device here: nothing to check", returncode=0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: pytest --device cuda"))
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu") or _takes_device(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in on_gpu])
    items[:] = on_gpu


def _takes_device(item: pytest.Item) -> bool:
    """Whether it uses the fixture below, rather than a parameter of the same name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "device" in getattr(item, "fixturenames", ()) and "device" not in parameters


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))
