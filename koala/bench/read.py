"""`koala bench read`: encoded samples read as training reads them, beside webdataset and datasets, and decoding before the VAE.

All readers get the same samples, each in its own format on the same disk, in shuffled batches, with the same number of workers.
Each measurement is a process of its own. The time begins with the first batch: workers have started then.
"""

import io
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from koala.bench import report, runner
from koala.console import progress

OURS = "koala"
PEERS = ("webdataset", "datasets")
_SIDE, _CAPTION, _SHARD, _BATCH = 128, 500, 100, 32
_MANY_SHARD = 100_000
_IMAGE = (1536, 1024)
Batch = tuple[Any, Sequence[str]]


def bench(samples: int, workers: int, rounds: int, rows: int, images: int, out: Path | None) -> None:
    """Measure and show; the raw figures go to `out`.

    samples: Encoded samples of 4 x 128 x 128 in float16, 128 KiB each.
    rows: Captions of 500 characters whose memory is measured.
    images: JPEG images of 1.5 Mpx that are decoded for a VAE that costs nothing.
    """
    names = [OURS, *(name for name in PEERS if find_spec(name))]
    runs: dict[str, list[runner.Figures]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        spec = {"folder": folder, "samples": samples, "workers": workers}
        runner.run("read", {**spec, "what": "prepare"})
        for name in progress([name for _ in range(rounds) for name in names], "bench read"):
            runs[name].append(runner.run("read", {**spec, "what": name}))
        runs["decode, 0 workers"] = [runner.run("read", {**spec, "what": "decode", "samples": images, "workers": 0})]
        for count in sorted({1, workers}):
            found = runner.run("read", {**spec, "what": "decode", "samples": images, "workers": count})
            runs[f"decode, {count} workers"] = [found]
        memory = runner.run("read", {**spec, "what": "memory", "samples": rows})
    table = [{"name": name, **runner.median(found, "samples_per_second")} for name, found in runs.items()]
    settings = {"samples": samples, "workers": workers, "rounds": rounds, "rows": rows, "memory": memory}
    report.read(report.document("read", settings, table), out)


def measure(folder: str, samples: int, workers: int, what: str) -> runner.Figures:
    """Measure one thing, in a process of its own."""
    from koala.bench.device import describe

    home = Path(folder)
    if what == "prepare":
        _prepare(home, samples)
        return {}
    if what == "memory":
        return _memory(home / "many", samples)
    figures = _decode(home, samples, workers) if what == "decode" else _read(_READERS[what](home, workers))
    return {**figures, "where": describe()}


def _read(batches: Iterable[Batch]) -> runner.Figures:
    iterator = iter(batches)
    next(iterator)
    start, count = time.perf_counter(), 0
    for latents, captions in iterator:
        assert latents.shape[1:] == (4, _SIDE, _SIDE)
        assert all(len(caption) == _CAPTION for caption in captions)
        count += len(captions)
    return {"samples_per_second": count / (time.perf_counter() - start)}


def _prepare(home: Path, samples: int) -> None:
    """Write the same samples in each format."""
    import tarfile

    import torch

    from koala.data.latents import write_shard

    random = np.random.default_rng(0)
    for name in (OURS, *PEERS):
        (home / name).mkdir()
    for first in range(0, samples, _SHARD):
        latents = random.standard_normal((min(_SHARD, samples - first), 4, _SIDE, _SIDE)).astype(np.float16)
        name = f"{first // _SHARD:05d}"
        file = f"{name}-1024x1024.safetensors"
        rows = [_row(first + place, file, place) for place in range(len(latents))]
        write_shard(home / OURS, name, rows, {file: list(torch.from_numpy(latents))})
        with tarfile.open(home / "webdataset" / f"{name}.tar", "w") as tar:
            for row, latent in zip(rows, latents, strict=True):
                stream = io.BytesIO()
                np.save(stream, latent)
                for extension, content in (("npy", stream.getvalue()), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{row['key']}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    if find_spec("datasets"):
        _prepare_datasets(home, samples)


def _prepare_datasets(home: Path, samples: int) -> None:
    import datasets

    from koala.data.latents import LatentSet

    def rows() -> Iterator[dict[str, Any]]:
        data = LatentSet(home / OURS)
        for index in range(samples):
            yield {"latent": data[index].latent.numpy(), "caption": data[index].caption}

    features = datasets.Features(
        latent=datasets.Array3D((4, _SIDE, _SIDE), "float16"), caption=datasets.Value("string")
    )
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(home / "cache"))
    made.save_to_disk(str(home / "datasets"))


def _row(number: int, file: str, place: int) -> dict[str, Any]:
    size = {"bucket": 1024, "original": 2048}
    return {
        "key": f"{number:09d}",
        "caption": _caption(number),
        "file": file,
        "row": place,
        **{f"{name}_{side}": value for name, value in size.items() for side in ("height", "width")},
        "crop_top": 0,
        "crop_left": 0,
        "flipped": False,
    }


def _caption(number: int) -> str:
    return f"sample {number} ".ljust(_CAPTION, "x")


def _koala(home: Path, workers: int) -> Iterable[Batch]:
    import torch
    from torch.utils.data import DataLoader

    from koala.data.latents import LatentSet
    from koala.distill.data import Order

    data = LatentSet(home / OURS)
    order = Order(data.buckets, _BATCH, seed=0)
    batches = [order.at(step).tolist() for step in range(order.steps(1))]

    def collate(items: Sequence[Any]) -> Batch:
        return torch.stack([item.latent for item in items]), [item.caption for item in items]

    return DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]


def _webdataset(home: Path, workers: int) -> Iterable[Batch]:
    import torch
    import webdataset
    from torch.utils.data import DataLoader

    files = sorted(map(str, (home / "webdataset").glob("*.tar")))
    data = webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(_SHARD).decode().to_tuple("npy", "txt")

    def collate(items: Sequence[Any]) -> Batch:
        return torch.stack([torch.from_numpy(latent) for latent, _ in items]), [caption for _, caption in items]

    return DataLoader(data, batch_size=_BATCH, num_workers=workers, collate_fn=collate)


def _datasets(home: Path, workers: int) -> Iterable[Batch]:
    import datasets
    import torch
    from torch.utils.data import DataLoader

    data = datasets.load_from_disk(str(home / "datasets")).with_format("torch")

    def collate(items: Sequence[Any]) -> Batch:
        return torch.stack([item["latent"] for item in items]), [item["caption"] for item in items]

    return DataLoader(data, batch_size=_BATCH, shuffle=True, num_workers=workers, collate_fn=collate)


_READERS: dict[str, Callable[[Path, int], Iterable[Batch]]] = {
    OURS: _koala,
    "webdataset": _webdataset,
    "datasets": _datasets,
}


def _decode(home: Path, images: int, workers: int) -> runner.Figures:
    """Encode JPEG images with a VAE that costs nothing."""
    import torch
    from PIL import Image

    from koala.data.config import EncodeConfig, EncodeMachine
    from koala.data.encode import encode_shards
    from koala.data.shards import Sample, ShardWriter, shards

    kept, out = home / "kept", home / f"encoded-{workers}"
    out.mkdir()
    if not kept.exists():
        random = np.random.default_rng(0)
        with ShardWriter(kept, images) as writer:
            for number in range(images):
                coarse = Image.fromarray(random.integers(256, size=(96, 144, 3), dtype=np.uint8))
                stream = io.BytesIO()
                coarse.resize(_IMAGE, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
                writer.write(Sample(f"{number:09d}", stream.getvalue(), "jpg", "", {}))

    def costs_nothing(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)

    config = EncodeConfig(buckets=((832, 1216),), machine=EncodeMachine(batch_size=8, workers=workers))
    encoded = encode_shards(shards(kept), out, costs_nothing, config)
    next(encoded)
    start = time.perf_counter()
    count = sum(1 for _ in encoded)
    return {"samples_per_second": count / (time.perf_counter() - start)}


def _memory(folder: Path, rows: int) -> runner.Figures:
    """Return the memory that the samples' table and order take in a process, by kind, bytes."""
    from koala.data.latents import LatentSet
    from koala.distill.data import Order

    _write_many(folder, rows)
    before = _resident()
    data = LatentSet(folder)
    order = Order(data.buckets, _BATCH, seed=0)
    order.at(order.steps(1))  # of the second epoch, which carries samples over
    drawn = np.random.default_rng(0).integers(rows, size=min(rows, 200_000))
    assert all(len(caption) == _CAPTION for caption in data.captions(drawn.tolist()))
    after = _resident()
    return {
        "private_bytes": after["RssAnon"] - before["RssAnon"],
        "shared_bytes": after["RssFile"] - before["RssFile"],
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _write_many(folder: Path, rows: int) -> None:
    """Write the tables of samples without latents."""
    import pyarrow as pa

    from koala.data.latents import COLUMNS

    folder.mkdir()
    for shard, first in enumerate(range(0, rows, _MANY_SHARD)):
        file = f"{shard:05d}-1024x1024.safetensors"
        found = [_row(first + place, file, place) for place in range(min(_MANY_SHARD, rows - first))]
        with pa.OSFile(str(folder / f"{shard:05d}.arrow"), "wb") as sink, pa.ipc.new_file(sink, COLUMNS) as writer:
            writer.write_table(pa.Table.from_pylist(found, COLUMNS))


def _resident() -> dict[str, int]:
    """Return resident memory by kind from Linux's /proc, bytes: RssAnon is this process's own, RssFile can be shared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(values[name].split()[0]) for name in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    runner.answer(measure)
