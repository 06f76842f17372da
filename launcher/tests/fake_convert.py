"""Stands in for `text-generation-server convert MODEL_DIR OUT_DIR`: writes the safetensors file the test prepared."""

import os
import shutil
import sys
from pathlib import Path

model_dir, out_dir = map(Path, sys.argv[1:3])
if not (model_dir / "pytorch_model.bin").is_file():
    sys.exit(f"{model_dir} has no pytorch_model.bin")
shutil.copy(os.environ["FAKE_WEIGHTS"], out_dir / "model.safetensors")
