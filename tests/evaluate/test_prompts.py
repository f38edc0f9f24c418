"""Prompt sets, their formats, and the seeds of their images."""

import json
import shutil
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from koala.demo.prompts import ShapesPrompts
from koala.errors import KoalaError
from koala.evaluate.prompt_files import FilePrompts, HubPrompts
from koala.evaluate.prompts import Prompt, PromptSet, Written, seeded_prompts

OWN = FilePrompts(path=Path(__file__).parents[2] / "infra" / "prompts.jsonl")


def test_prompts_are_cycled_and_each_has_its_own_seed(tmp_path) -> None:
    prompts = seeded_prompts(ShapesPrompts(), count=110, seed=7)
    assert prompts[0].text == prompts[108].text
    assert prompts[0].seed == 7
    assert prompts[108].seed == 115
    assert len({prompt.text for prompt in prompts}) == 108
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n a ship \n")
    own = seeded_prompts(FilePrompts(path=file), count=3, seed=0)
    assert [prompt.text for prompt in own] == ["a fox", "a ship", "a fox"]


def test_categories_take_turns() -> None:
    class Uneven(PromptSet):
        kind: str = "uneven"

        def load(self) -> list[Written]:
            return [Written("a1", "a"), Written("a2", "a"), Written("a3", "a"), Written("b1", "b", ("a chunk",))]

    prompts = seeded_prompts(Uneven(), count=6, seed=5)
    assert [prompt.text for prompt in prompts] == ["a1", "b1", "a2", "a3", "a1", "b1"]
    assert prompts[1] == Prompt("b1", 6, "b", ("a chunk",))


def test_a_sample_of_a_set_depends_on_its_prompts_only(tmp_path) -> None:
    """Not on their order, nor on prompts that are added but for those whose place they take."""

    def sample(rows: list[tuple[str, str]], count: int) -> list[str]:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": text, "category": name}) + "\n" for text, name in rows))
        return [prompt.text for prompt in seeded_prompts(FilePrompts(path=file), count, 0)]

    rows = [(f"{name} {number}", name) for name in "ab" for number in range(50)]
    found = sample(rows, 20)
    assert [text[0] for text in found] == ["a", "b"] * 10
    assert found[::2] != [f"a {number}" for number in range(10)]  # not the first
    assert sample([rows[0], *reversed(rows[1:])], 20) == found
    assert sample(rows, 30)[:20] == found
    assert len(set(found) - set(sample([*rows, ("a fox", "a"), ("b fox", "b")], 20))) <= 2
    assert sample(rows, 100)[:2] == ["a 0", "b 0"]  # all: as they stand in the file


def test_the_projects_own_set() -> None:
    """Seven categories of 72 prompts, each prompt once, with noun chunks that stand in it."""
    prompts = OWN.load()
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(
        ("objects", "attributes", "counts", "relations", "scenes", "styles", "text"), 72
    )
    assert len({prompt.text for prompt in prompts}) == 504
    for prompt in prompts:
        assert 1 <= len(prompt.chunks) <= 8, prompt
        assert all(chunk in prompt.text for chunk in prompt.chunks), prompt
        assert not {"a", "an", "the"} & set(prompt.chunks), prompt
        assert prompt.text == prompt.text.strip()
        assert prompt.text.isprintable()
    assert Counter(prompt.category for prompt in seeded_prompts(OWN, 70, 0)).most_common()[-1][1] == 10


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("x.txt", "a fox\r\n\n a ship ", [Written("a fox"), Written("a ship")]),
        (
            "x.jsonl",
            '{"prompt": "a fox", "category": "animals", "chunks": ["a fox"]}\n\n{"prompt": "a ship"}\n',
            [Written("a fox", "animals", ("a fox",)), Written("a ship")],
        ),
        ("x.jsonl", '{"prompt": "a fox", "category": null, "chunks": null}', [Written("a fox")]),
        ("x.jsonl", '{"prompt": "a fox\u2028and a ship"}', [Written("a fox\u2028and a ship")]),
        ("x.txt", "\ufeffa fox", [Written("a fox")]),
        ("x.tsv", "\ufeffPrompt\na fox", [Written("a fox")]),
        (  # PartiPrompts
            "x.tsv",
            'Prompt\tCategory\tChallenge\tNote\n"a ""fox"""\tAnimals\tBasic\t\nbond\tAbstract\tBasic\t\n',
            [Written('a "fox"', "Animals"), Written("bond", "Abstract")],
        ),
        ("x.json", '["a fox", "a ship"]', [Written("a fox"), Written("a ship")]),  # HPSv2's
        (  # COCO's captions
            "x.json",
            json.dumps({"images": [], "annotations": [{"id": 1, "caption": "A fox.\n"}, {"caption": "A ship."}]}),
            [Written("A fox."), Written("A ship.")],
        ),
    ],
)
def test_formats(tmp_path, name, text, found) -> None:
    (tmp_path / name).write_text(text)
    assert FilePrompts(path=tmp_path / name).load() == found


def test_the_files_of_a_folder_are_categories(tmp_path) -> None:
    (tmp_path / "color_val.txt").write_text("a red fox\na blue ship")
    (tmp_path / "spatial_val.txt").write_text("a fox on a ship")
    (tmp_path / "README.md").write_text("not a prompt")
    assert FilePrompts(path=tmp_path).load() == [
        Written("a red fox", "color_val"),
        Written("a blue ship", "color_val"),
        Written("a fox on a ship", "spatial_val"),
    ]
    assert FilePrompts(path=tmp_path / "c*_val.txt").load() == [
        Written("a red fox"),
        Written("a blue ship"),
    ]
    (tmp_path / "color_train.txt").write_text("a green fox")
    own = FilePrompts(path=tmp_path / "*_val.txt").load()
    assert {written.category for written in own} == {"color_val", "spatial_val"}
    with pytest.raises(KoalaError, match=r"none\*\.txt, which is not there"):
        FilePrompts(path=tmp_path / "none*.txt").load()


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("x.txt", "\n", "holds no prompt: write one a line"),
        ("x.csv", "a fox", "has no known format: give one of .jsonl, .txt, .tsv, .json"),
        ("x.jsonl", "{", "cannot be read as .jsonl of prompts"),
        ("x.jsonl", '{"caption": "a fox"}', "it lacks 'prompt'"),
        ("x.jsonl", "[1]", "cannot be read as .jsonl"),
        ("x.jsonl", '{"prompt": null}', "None is not a text"),
        ("x.jsonl", '{"prompt": "a fox", "chunks": "a fox"}', "chunks must be a list, not 'a fox'"),
        ("x.json", '[{"prompt": "a fox"}]', "{'prompt': 'a fox'} is not a text"),
        ("x.tsv", "a fox\tanimals\na ship\tships", "it lacks 'Prompt'"),
        ("x.json", '{"captions": []}', "it lacks 'annotations'"),
        ("x.json", "5", "cannot be read as .json"),
    ],
)
def test_a_file_of_no_prompts_is_refused(tmp_path, name, text, line) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(KoalaError) as error:
        FilePrompts(path=tmp_path / name).load()
    assert line in str(error.value)
    assert name in str(error.value)
    with pytest.raises(KoalaError, match="not there"):
        FilePrompts(path=tmp_path / "nowhere.txt").load()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(KoalaError, match="holds no prompt"):
        FilePrompts(path=tmp_path).load()


def test_prompts_of_the_hub(as_hub, tmp_path, monkeypatch) -> None:
    """Over HTTP, from a server in the Hub's place: two files of one revision, each a category."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            body = {"anime.json": b'["a fox"]', "photo.json": b'["a ship"]'}.get(self.path.rpartition("/")[2])
            self.send_response(200 if body else 404)
            body = body or b""
            self.send_header("ETag", f'"{len(body)}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    as_hub(Hub)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    prompts = HubPrompts(repository="owner/prompts", revision="c" * 40, files=("anime.json", "photo.json"))
    assert prompts.load() == [Written("a fox", "anime"), Written("a ship", "photo")]
    assert f"/datasets/owner/prompts/resolve/{'c' * 40}/anime.json" in asked
    lacking = prompts.model_copy(update={"files": ("none.json",)})
    with pytest.raises(KoalaError, match=r"cannot fetch the prompts of owner/prompts from the Hugging Face Hub"):
        lacking.load()
