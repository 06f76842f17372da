"""The demo model that is installed with the package: a small Llama that knows Python's standard library.

Only says where the files are; how they were made is in demo/README.md of the source tree.
"""

from pathlib import Path

MODEL_ID = "tgi-demo"


def model_path() -> Path:
    """The folder of the model, in the Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"


def draft_path() -> Path:
    """The folder of its draft model: the same tokenizer, at most a fifth of the parameters."""
    return Path(__file__).resolve().parent / "draft"
