"""New captions in training: which sample of which step takes one, and what that does not change."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import losses, same, weights

from koala.data.captions.mixed import NewCaptions, align
from koala.data.latents import LatentSet
from koala.data.recaption import COLUMNS
from koala.distill.data import TrainingSet
from koala.distill.distill import _new_captions
from koala.distill.job import checkpoints
from koala.distill.train import StopSignal, train


@pytest.fixture
def captions(artifacts: Any, tmp_path: Path) -> Path:
    """New captions of every sample but those whose key ends in 7, in another order than the latents'."""
    folder = tmp_path / "captions"
    folder.mkdir()
    for shard in artifacts.latents.glob("*.parquet"):
        keys = pq.read_table(shard)["key"].to_pylist()
        rows = [{"key": key, "caption": None if key.endswith("7") else f"new {key}", "model": "m"} for key in keys]
        rows = [*reversed(rows), {"key": "of another filter", "caption": "foreign", "model": "m"}]
        pq.write_table(pa.Table.from_pylist(rows, COLUMNS), folder / shard.name)
    return folder


@pytest.fixture
def aligned(artifacts: Any, captions: Path, tmp_path: Path) -> Path:
    file = tmp_path / "new.arrow"
    assert align(captions, artifacts.latents, file)
    return file


def test_new_captions_are_found_by_the_index_of_the_encoded_sample(artifacts: Any, aligned: Path) -> None:
    keys = LatentSet(artifacts.latents).keys(range(37))
    found = NewCaptions(aligned)
    wanted = [None if key.endswith("7") else f"new {key}" for key in keys]
    assert [found[index] for index in range(37)] == wanted
    # As a data loader's worker gets it.
    assert [pickle.loads(pickle.dumps(found))[index] for index in range(37)] == wanted


def test_several_shards_empty_ones_and_ones_without_captions(tmp_path: Path) -> None:
    latents, captions = tmp_path / "latents", tmp_path / "captions"
    for folder in (latents, captions):
        folder.mkdir()
    for shard, keys in enumerate((["a", "b"], [], ["c"], ["d", "e"])):
        table = pa.table({"key": pa.array(keys, pa.string())})
        with pa.ipc.new_file(latents / f"{shard}.arrow", table.schema) as writer:
            writer.write_table(table)
        rows = [{"key": key, "caption": key.upper(), "model": "m"} for key in keys]
        if shard != 2:
            pq.write_table(pa.Table.from_pylist(rows, COLUMNS), captions / f"{shard}.parquet")
    assert align(captions, latents, tmp_path / "new.arrow")
    found = NewCaptions(tmp_path / "new.arrow")
    assert [found[index] for index in range(5)] == ["A", "B", None, "D", "E"]


def test_both_captions_are_seen_at_about_the_share(artifacts: Any, recipe, aligned: Path) -> None:
    data = LatentSet(artifacts.latents)
    items = TrainingSet(data, recipe(recaption_share=0.3), 1000, NewCaptions(aligned))
    index = next(index for index, key in enumerate(data.keys(range(37))) if not key.endswith("7"))
    seen = [items[(step, place, index)][5] for step in range(100) for place in range(10)]
    own, new = data.captions([index])[0], NewCaptions(aligned)[index]
    assert set(seen) == {own, new}
    assert seen.count(new) / len(seen) == pytest.approx(0.3, abs=0.05)
    # It follows from the step and the place only.
    torch.manual_seed(5)
    assert [items[(step, 3, index)][5] for step in range(20)] == seen[3:200:10]


def test_a_sample_without_a_new_caption_keeps_its_own(artifacts: Any, recipe, aligned: Path) -> None:
    data = LatentSet(artifacts.latents)
    items = TrainingSet(data, recipe(recaption_share=1.0), 1000, NewCaptions(aligned))
    for index, (key, own) in enumerate(zip(data.keys(range(37)), data.captions(range(37)), strict=True)):
        assert items[(0, 0, index)][5] == (own if key.endswith("7") else f"new {key}")


def test_the_share_changes_nothing_else_and_nothing_without_new_captions(artifacts: Any, recipe, aligned: Path) -> None:
    data = LatentSet(artifacts.latents)
    plain = TrainingSet(data, recipe(), 1000)
    without = TrainingSet(data, recipe(recaption_share=0.7), 1000)
    mixed = TrainingSet(data, recipe(recaption_share=0.7), 1000, NewCaptions(aligned))
    for place in ((5, 2, 30), (6, 0, 1), (7, 1, 11)):
        for other in (without, mixed):
            for one, two in zip(plain[place][:5], other[place][:5], strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
        assert plain[place][5:] == without[place][5:]


def test_new_captions_are_read_only_where_a_share_asks_for_them(
    artifacts: Any, recipe, captions: Path, tmp_path: Path, capsys
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    assert _new_captions(recipe(), captions, artifacts.latents, state) is None
    assert list(state.iterdir()) == []
    assert _new_captions(recipe(recaption_share=0.5), artifacts.captions, artifacts.latents, state) is None
    assert "holds no new captions: recaption_share 0.5 changes nothing" in capsys.readouterr().err
    file = _new_captions(recipe(recaption_share=0.5), captions, artifacts.latents, state)
    assert file is not None
    written = file.stat().st_mtime_ns
    assert _new_captions(recipe(recaption_share=0.5), captions, artifacts.latents, state) == file
    assert file.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_run_with_new_captions_resumes_to_the_same_bits(make_job, aligned: Path, uncut: Path) -> None:
    jobs = [make_job(name, recaption_share=0.5).model_copy(update={"new_captions": aligned}) for name in ("one", "two")]
    for job in jobs:
        train(job, StopSignal())
    cut, whole = jobs
    shutil.rmtree(cut.state / "unet")
    shutil.rmtree(checkpoints(cut.state)[-1])
    train(cut, StopSignal())
    assert same(weights(cut.state), weights(whole.state))
    assert losses(cut.state) == losses(whole.state)
    assert not same(weights(whole.state), weights(uncut))  # the new captions are trained on
