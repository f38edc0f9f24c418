"""A server that speaks as much of the Hub as fetching a pipeline takes."""

import json
import shutil
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders of `root`, each at one revision: REVISION, if `revisions` has no other."""

    root: Path
    asked: list[str]
    revisions: Mapping[str, str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/tree/")
            folder = self.root / name
            if not folder.is_dir() or revision != self.revisions.get(name, REVISION):
                return self.answer(404, error="RepoNotFound")
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            listed = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ]
            return self.answer(200, json.dumps(listed).encode())
        name, _, rest = path[1:].partition("/resolve/")
        revision, _, wanted = rest.partition("/")
        file = self.root / name / wanted
        found = revision == self.revisions.get(name, REVISION) and file.is_file()
        return self.answer(200, file.read_bytes()) if found else self.answer(404, error="EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, code: int, content: bytes = b"", error: str | None = None) -> None:
        self.send_response(code)
        self.send_header("ETag", f'"{hash(self.path)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_teacher: Path, as_hub: Callable[[type[Hub]], None]) -> type[Hub]:
    """`us/sdxl`, a whole pipeline; `us/fast`, a U-Net alone, under a name of its own, and what must not be fetched."""
    root = tmp_path / "hub"
    shutil.copytree(tiny_teacher, root / "us/sdxl")
    (root / "us/sdxl/unet/pytorch_model.bin").write_bytes(b"a pickle")
    fast = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True).unet
    with torch.no_grad():
        fast.conv_in.weight.fill_(0.5)
    fast.save_pretrained(tmp_path / "fast")
    (root / "us/fast").mkdir(parents=True)
    shutil.copy(tmp_path / "fast/diffusion_pytorch_model.safetensors", root / "us/fast/four_steps.safetensors")
    (root / "us/fast/run_me.py").write_text("raise SystemExit")

    handler = type("Handler", (Hub,), {"root": root, "asked": [], "revisions": {}})
    as_hub(handler)
    return handler


@pytest.fixture
def pipeline(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher's folder that a test may change."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "pipeline"))
