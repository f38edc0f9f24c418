"""A release in diffusers and transformers of a year back, which know nothing of koala."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from publish.test_publish import CONFIG, folders, generated  # noqa: F401

from koala.publish.publish import publish
from koala.run import NoRun

OLDER = ("diffusers==0.35.2", "transformers==4.57.1", "huggingface_hub==0.36.0", "tokenizers==0.22.1")

GENERATE = """
import json, sys
import numpy as np, torch
import diffusers, transformers
assert "koala" not in sys.modules
pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
    sys.argv[1], torch_dtype=torch.float32, use_safetensors=True, add_watermarker=False, local_files_only=True
)
(image,) = pipeline(
    ["a large red circle on a white background"], num_inference_steps=3, guidance_scale=2.0,
    generator=[torch.Generator().manual_seed(3)],
).images
np.save(sys.argv[2], np.asarray(image, int))
print(json.dumps([diffusers.__version__, transformers.__version__]))
"""


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the older packages, which stand before those of this environment."""
    folder = tmp_path_factory.mktemp("older")
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder, *OLDER]
    subprocess.run(command, check=True)
    return folder


def test_a_release_generates_the_same_image(folders, older: Path, tmp_path: Path) -> None:  # noqa: F811
    release, found = tmp_path / "release", tmp_path / "image.npy"
    publish(CONFIG, **folders, out=release, run=NoRun())
    environment = {**os.environ, "PYTHONPATH": str(older), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", GENERATE, release, found]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == ["0.35.2", "4.57.1"]
    assert np.abs(np.load(found) - generated(release)).max() <= 1
    for unused in ("newly initialized", "were not used", "not expected"):
        assert unused not in ended.stderr
