"""The page of `koala ui`, on a real server."""

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from ranks import free_port

from koala import generate, ui
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.sheet import open_model
from koala.teacher.config import LoraPart

SAMPLING = SamplingConfig(steps=2, guidance=2.0, prompts=("a large red circle",))


@pytest.fixture(scope="module")
def address(tiny_teacher: Path) -> Iterator[str]:
    models = {f"{tiny_teacher}/": open_model(str(tiny_teacher)), str(tiny_teacher): open_model(str(tiny_teacher))}
    page, port = ui.build(models, SAMPLING), free_port()
    page.launch(server_name=ui.HOST, server_port=port, prevent_thread_lock=True, quiet=True, **ui._look())
    yield f"http://{ui.HOST}:{port}/"
    page.close()


def test_each_model_generates_what_the_command_does(address: str, tiny_teacher: Path, tmp_path: Path) -> None:
    client = Client(address, verbose=False, download_files=tmp_path)
    one, said, other, _ = client.predict("a large red circle", "a blue square", 3, 2, 2.0, api_name="/generate")
    pipeline = generate.load(tiny_teacher)
    (expected,) = generate.generate(pipeline, [("a large red circle", 3)], SAMPLING, "a blue square")
    for file in (one, other):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(expected, int)).max() <= 1
    seconds, weights = said.split(", ")
    assert float(seconds.removesuffix(" s")) > 0
    assert weights.endswith(" GB of weights")


def test_an_empty_prompt_is_one_line(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AppError, match="write a prompt first"):
        Client(address, verbose=False).predict(" ", "", 0, 2, 2.0, api_name="/generate")
    assert "Traceback" not in capfd.readouterr().err


def test_the_page_asks_no_other_host_for_fonts(address: str) -> None:
    page = urllib.request.urlopen(address).read().decode()
    assert "fonts.googleapis" not in page
    assert "a large red circle" in page


def test_what_cannot_be_served_is_one_line(tiny_teacher: Path) -> None:
    with pytest.raises(KoalaError, match="there is no model at nowhere"):
        ui.serve(["nowhere"], SAMPLING, free_port())
    with pytest.raises(KoalaError, match=r"there is no LoRA at nowhere\.safetensors"):
        ui.serve([str(tiny_teacher)], SAMPLING, free_port(), [LoraPart(file=Path("nowhere.safetensors"))])
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        with pytest.raises(KoalaError, match=r"port \d+ is in use: choose another \(--port\)"):
            ui.serve([str(tiny_teacher)], SAMPLING, taken.getsockname()[1])
