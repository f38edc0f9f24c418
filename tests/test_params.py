"""params.yaml: its profiles are whole; what is wrong in it is said in one line."""

from pathlib import Path

import pytest
import yaml

from koala.config import load
from koala.errors import KoalaError


def test_every_profile_is_complete_and_frozen() -> None:
    for profile in ("demo", "smoke", "sdxl"):
        params = load(profile=profile)
        assert set(params.students) == {"koala-700m", "koala-1b"}
        with pytest.raises(ValueError, match="frozen"):
            params.distill.steps = 1  # type: ignore[misc]


def test_smoke_is_the_demo_with_fewer_steps() -> None:
    """What the tests run is the demo's configuration, but for counts, ports and thresholds."""
    demo, smoke = load(profile="demo"), load(profile="smoke")
    assert smoke.filter.model_copy(update={"shard_size": demo.filter.shard_size}) == demo.filter
    assert smoke.encode == demo.encode
    assert smoke.distill.features == demo.distill.features


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (
            lambda d: d["profiles"]["smoke"]["distill"].update(stepz=3),
            "profiles.smoke.distill.stepz: no such parameter",
        ),
        (
            lambda d: d["profiles"]["smoke"]["distill"].update(steps="many"),
            "profiles.smoke.distill.steps: input should be",
        ),
        (lambda d: d["profiles"]["smoke"]["distill"].pop("steps"), "profiles.smoke.distill.steps: field required"),
        (lambda d: d["profiles"]["smoke"].pop("encode"), "profiles.smoke.encode: field required"),
        (
            lambda d: d["profiles"]["smoke"]["distill"].update(micro_batch=3),
            "batch_size 8 is not a multiple of micro_batch 3",
        ),
        (lambda d: d["students"]["koala-700m"].update(mid="shrink"), "students.koala-700m.mid: input should be"),
        (
            lambda d: d.update(profile="demos"),
            "names the profile 'demos': choose one of demo, sdxl, sdxl-24gb, sdxl-lightning,",
        ),
        (lambda d: d.pop("profiles"), "has no section 'profiles'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(workspace: Path, break_it, line: str) -> None:
    document = yaml.safe_load(Path("params.yaml").read_text())
    break_it(document)
    Path("params.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(KoalaError) as error:
        load()
    assert line in str(error.value) and "\n" not in str(error.value)


def test_yaml_that_is_none_is_said_with_its_place(workspace: Path) -> None:
    Path("params.yaml").write_text("profile: demo\nprofiles: {demo: [}\n")
    with pytest.raises(KoalaError, match=r"params.yaml is not YAML at line 2, column 19"):
        load()


def test_no_params_and_no_student(workspace: Path) -> None:
    with pytest.raises(KoalaError, match="choose one of koala-1b, koala-700m"):
        load().student("koala-2b")
    Path("params.yaml").unlink()
    with pytest.raises(KoalaError, match=r"no params.yaml here"):
        load()
