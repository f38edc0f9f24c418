"""Quotas: so many samples of a host, a language or a carried column, the same ones whatever the number of workers."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from koala.data.config import FilterConfig, FilterMachine, Quota
from koala.data.explain import explain
from koala.data.filter import filter
from koala.data.rules.language import Language
from koala.data.rules.words import Words
from koala.data.shards import Sample, ShardWriter
from koala.errors import KoalaError
from koala.run import NoRun

SCORES = [5.0, 9.0, None, 7.0, 9.0, 1.0, 8.0, 2.0, 3.0, 4.0, 6.0, 0.5]


@pytest.fixture
def images(out: Path) -> Path:
    """Twelve samples in shards of five: hosts a, b, c in turn; two licences, none for the last; one caption is too short."""
    with ShardWriter(Path("images"), 5) as writer:
        for index, score in enumerate(SCORES):
            stream = io.BytesIO()
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
                stream, "PNG"
            )
            meta = {"url": f"https://{'abc'[index % 3]}.example/{index}", "license": ["by", "cc0"][index // 8]}
            meta |= {"aesthetic": score}
            if index == 11:
                del meta["license"]
            caption = "one" if index == 0 else "three words here"
            writer.write(Sample(f"{index:09d}", stream.getvalue(), "png", caption, meta))
    return Path("images")


def kept(images: Path, out: Path, *quotas: Quota, processes: int = 1) -> list[int]:
    rules = (Words(at_least=2),)
    config = FilterConfig(rules=rules, quotas=quotas, shard_size=4, machine=FilterMachine(processes=processes))
    out.mkdir(exist_ok=True)
    filter(config, images, Path("scores"), out, NoRun())
    rows = [row for file in sorted((out / "verdicts").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert not {name for name in rows[0] if name.startswith(("quota", "best"))}
    dropped = Counter(row["rule"] for row in rows if row["rule"])
    assert json.loads((out / "report.json").read_text())["dropped"] == dict(dropped)
    return [int(row["key"]) for row in rows if row["rule"] is None]


def test_the_first_of_each_host_stay_and_what_a_rule_drops_does_not_count(images: Path, out: Path) -> None:
    assert kept(images, out, Quota(by="host", at_most=2)) == [1, 2, 3, 4, 5, 6]


def test_the_best_by_a_score_stay(images: Path, out: Path) -> None:
    """Of host b, two have the same score; of c, one has none."""
    assert kept(images, out, Quota(by="host", at_most=1, best="aesthetic")) == [1, 3 + 3, 8]


def test_samples_without_a_value_all_stay_and_quotas_follow_each_other(images: Path, out: Path) -> None:
    assert kept(images, out, Quota(by="license", at_most=1)) == [1, 8, 11]
    both = Quota(by="license", at_most=4), Quota(by="host", at_most=1)
    assert kept(images, Path("other"), *both) == [1, 2, 3]


def test_the_bytes_do_not_depend_on_the_number_of_workers(images: Path, out: Path) -> None:
    quotas = Quota(by="license", at_most=3, best="aesthetic"), Quota(by="host", at_most=2)
    assert kept(images, out, *quotas) == kept(images, Path("other"), *quotas, processes=2)
    for file in sorted(out.glob("*.tar")):
        assert file.read_bytes() == (Path("other") / file.name).read_bytes()


def test_explain_names_the_quota(images: Path, out: Path) -> None:
    kept(images, out, Quota(by="host", at_most=1))
    way = explain("000000004", Path("table"), images, out, Path("latents"))
    assert way.verdict
    assert way.verdict["rule"] == "quota.host"


@pytest.mark.parametrize("names", [{"by": "camera"}, {"by": "host", "best": "beauty"}])
def test_a_column_that_no_sample_has_is_one_line(names: dict, images: Path, out: Path) -> None:
    with pytest.raises(KoalaError, match=r"filter.quotas names '(camera|beauty)', which no sample has"):
        kept(images, out, Quota(at_most=1, **names))


def test_languages_need_the_rule_that_tells_them() -> None:
    quotas = (Quota(by="language", at_most=1),)
    with pytest.raises(ValidationError, match="needs the rule `language`"):
        FilterConfig(quotas=quotas)
    assert FilterConfig(quotas=quotas, rules=(Language(),)).quotas == quotas
