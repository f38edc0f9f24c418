"""params.yaml: its profiles and machines are whole; what is wrong in it is said in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from koala import params as parameters
from koala.config import Config
from koala.data import pins
from koala.data.pins import Pin
from koala.errors import KoalaError
from koala.params import load

ROOT = Path(__file__).parents[1]
DOCUMENT = yaml.safe_load((ROOT / "params.yaml").read_text())
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def edit(workspace: Path) -> Callable[[Edit], None]:
    """Change the workspace's params.yaml by a function of its document."""

    def apply(change: Edit) -> None:
        document = yaml.safe_load(Path("params.yaml").read_text())
        change(document)
        Path("params.yaml").write_text(yaml.safe_dump(document))

    return apply


@pytest.mark.parametrize("machine", DOCUMENT["machines"])
@pytest.mark.parametrize("profile", DOCUMENT["profiles"])
def test_every_profile_runs_on_every_machine_and_is_frozen(profile: str, machine: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load(profile=profile, machine=machine)
    assert set(params.students) == {"koala-700m", "koala-1b"}
    config = params.distill("koala-700m")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 1  # type: ignore[misc]


def test_smoke_is_the_demo_with_fewer_steps() -> None:
    """What the tests run is the demo's configuration, but for counts and thresholds."""
    demo, smoke = load(ROOT / "params.yaml", "demo").recipe, load(ROOT / "params.yaml", "smoke").recipe
    assert smoke.filter.model_copy(update={"shard_size": demo.filter.shard_size}) == demo.filter
    assert smoke.encode == demo.encode
    assert smoke.distill.model_copy(update={"steps": 400, "batch_size": 32, "held_out": 128}) == demo.distill


def test_sampling_is_said_once(workspace: Path, edit) -> None:
    edit(lambda document: document["profiles"]["smoke"]["sampling"].update(steps=7))
    params = load()
    stages = (("distill", "koala-1b"), ("reference", None), ("evaluate", "koala-1b"), ("publish", "koala-1b"))
    assert {params.config(*stage).sampling.steps for stage in stages} == {7}  # type: ignore[attr-defined]


def test_the_machine_says_how_and_nothing_of_what(workspace: Path, edit) -> None:
    here = load()
    edit(lambda document: document["machines"].update(other={"distill": {"micro_batch": 1, "log_every": 99}}))
    there = load(machine="other")
    for stage in ("download", "filter", "encode", "reference", "evaluate"):
        assert here.config(stage).recipe() == there.config(stage).recipe()
    ours, theirs = here.distill("koala-1b"), there.distill("koala-1b")
    assert ours.machine.log_every != theirs.machine.log_every
    assert ours.recipe() == theirs.recipe()
    assert "machine" not in ours.recipe()
    assert "sampling" not in ours.recipe()


def test_the_environment_names_the_machine(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().machine == "cpu"
    monkeypatch.setenv("KOALA_MACHINE", "gpu-24gb")
    assert load().machine == "gpu-24gb"
    assert load(machine="gpu-80gb").machine == "gpu-80gb"


def test_more_steps_at_a_constant_rate_are_the_same_work(workspace: Path, edit) -> None:
    cosine = load().distill("koala-1b")
    longer = cosine.model_copy(update={"steps": 999})
    assert cosine.resume_key() != longer.resume_key()
    constant, longer = (each.model_copy(update={"schedule": "constant"}) for each in (cosine, longer))
    assert constant.resume_key() == longer.resume_key()
    assert constant.recipe() != longer.recipe()


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
            lambda d: d["profiles"]["smoke"]["filter"]["rules"]["words"].update(at_least="x"),
            "profiles.smoke.filter.rules.words.at_least: input should be",
        ),
        (lambda d: d["profiles"]["smoke"]["filter"]["rules"].update(colour={}), "profiles.smoke.filter.rules: "),
        (
            lambda d: d["profiles"]["smoke"]["distill"].update(machine={}),
            "distill.machine: it stands under machines.NAME",
        ),
        (lambda d: d["profiles"]["smoke"]["evaluate"].update(sampling={}), "it stands under profiles.smoke.sampling"),
        (lambda d: d["machines"]["cpu"]["distill"].update(steps=3), "machines.cpu.distill.steps: no such parameter"),
        (
            lambda d: d["machines"]["cpu"]["distill"].update(launch="no.yaml"),
            "distill.launch names no.yaml, which is not",
        ),
        (
            lambda d: d["machines"]["cpu"]["distill"].update(launch="infra/accelerate/fsdp2.yaml", channels_last=True),
            "set distill.channels_last to false",
        ),
        (
            lambda d: d["students"]["koala-700m"]["unet"].update(mid="shrink"),
            "students.koala-700m.unet.mid: input should",
        ),
        (
            lambda d: d["students"]["koala-700m"].update(distill={"stepz": 3}),
            "students.koala-700m.distill.stepz: no such parameter",
        ),
        (lambda d: d["students"]["koala-700m"].update(distill={"machine": {}}), "a student has none of its own"),
        (
            lambda d: d["profiles"]["smoke"]["distill"].update(
                features=[{"kind": "self_attention", "stages": ["Mid"]}]
            ),
            "smoke.distill.features: koala-700m: the student has no feature self_attention in stage Mid: choose from",
        ),
        (
            lambda d: d["profiles"]["smoke"]["publish"].update(require=[{"metric": "attribute/all", "at_least": 0.8}]),
            "profiles.smoke: publish.require names 'attribute/all', which evaluate.metrics does not measure: choose from "
            "attributes/size, attributes/colour, attributes/shape, attributes/background, attributes/all, attributes/nothing, "
            "agreement_db, unet_parameters, unet_flops, disk_bytes, step_ms, image_ms, peak_bytes, size_of_teacher, speed_up, "
            "image_speed_up",
        ),
        (
            lambda d: d["profiles"]["smoke"]["publish"].update(
                require=[{"metric": "agreement_db", "of": "teacher", "at_least": 0.8}]
            ),
            "publish.require names 'agreement_db' of the teacher, which evaluate.metrics does not measure: choose from "
            "attributes/all",
        ),
        (
            lambda d: d["profiles"]["smoke"]["publish"].update(require=[{"metric": "speed_up"}]),
            "profiles.smoke.publish.require: the rule for speed_up wants either at_least or at_most",
        ),
        (lambda d: d.update(profile="demos"), "names the profile 'demos': choose one of demo, sdxl, sdxl-lightning,"),
        (lambda d: d.update(machine="laptop"), "names the machine 'laptop': choose one of 8xgpu-24gb,"),
        (lambda d: d.pop("profiles"), "profiles: field required"),
        (
            lambda d: d["profiles"]["smoke"]["filter"].update(rules={"size": 3}),
            "profiles.smoke.filter.rules: the options of size must be a mapping, not 3",
        ),
        (
            lambda d: d["profiles"]["smoke"]["publish"]["require"][0].update(at_least=float("nan")),
            "profiles.smoke.publish.require.at_least: input should be a finite number",
        ),
        # Names of folders, of stages (`distill@NAME`) and of releases (`NAME@v2`).
        (lambda d: d["students"].update({"a/b": d["students"]["koala-1b"]}), "students.a/b.[key]: string should match"),
        (lambda d: d["students"].update({"..": d["students"]["koala-1b"]}), "[key]: string should match"),
        (lambda d: d["students"].update({"a@v2": d["students"]["koala-1b"]}), "[key]: string should match"),
        (lambda d: d["profiles"].update({"../x": d["profiles"]["smoke"]}), "[key]: string should match"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(edit, break_it: Edit, line: str) -> None:
    edit(break_it)
    with pytest.raises(KoalaError) as error:
        load()
    assert line in str(error.value)
    assert "\n" not in str(error.value)


FSDP2, TWO = "infra/accelerate/fsdp2.yaml", "infra/accelerate/cpu-two.yaml"


@pytest.mark.parametrize(
    ("machine", "recipe", "launch", "line"),
    [
        ({"launch": FSDP2, "channels_last": True}, {}, None, "set distill.channels_last to false (FSDP2 shards"),
        ({"launch": FSDP2, "ema_offload": True}, {}, None, "set distill.ema_offload to false (the EMA is sharded"),
        ({"launch": FSDP2}, {"optimizer": "adamw-8bit"}, None, "(FSDP2): set distill.optimizer to adamw"),
        ({"launch": TWO}, {"batch_size": 7}, None, "distill.batch_size 7 does not divide among the 2 processes of"),
        ({"launch": "own.yaml"}, {}, "mixed_precision: fp16", "own.yaml asks for fp16, whose range the losses leave"),
        ({"launch": "own.yaml"}, {}, None, "distill.launch names own.yaml, which is not there: choose one of"),
        ({"launch": "own.yaml"}, {}, "- a list", "own.yaml is no accelerate configuration: choose one of"),
        ({"launch": "own.yaml"}, {}, "a: [", "own.yaml is no accelerate configuration: choose one of"),
        ({}, {"teacher_float8": True}, None, "teacher_float8 gives bfloat16: set teacher_dtype to bfloat16"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_when_it_is_read(
    edit, machine: dict[str, Any], recipe: dict[str, Any], launch: str | None, line: str
) -> None:
    if launch:
        Path("own.yaml").write_text(launch)
    load()

    def change(document: dict[str, Any]) -> None:
        document["machines"]["cpu"]["distill"] |= machine
        document["profiles"]["smoke"]["distill"] |= recipe

    edit(change)
    with pytest.raises(KoalaError) as error:
        load()
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_students_own_recipe_is_refused_where_it_cannot_work(edit) -> None:
    def change(document: dict[str, Any]) -> None:
        document["machines"]["cpu"]["distill"]["launch"] = TWO
        document["students"]["koala-1b"]["distill"] = {"batch_size": 7}

    edit(change)
    with pytest.raises(KoalaError, match=r"distill.batch_size 7 does not divide among the 2 processes"):
        load()


def test_a_students_row_changes_that_student_and_no_other(workspace: Path, edit) -> None:
    before = load()
    edit(lambda document: document["students"]["koala-1b"].update(distill={"features": "bk-sdm", "steps": 9}))
    after = load()
    assert after.distill("koala-700m") == before.distill("koala-700m")
    assert after.distill("koala-1b") == before.distill("koala-1b").model_copy(update={"features": "bk-sdm", "steps": 9})
    for stage in ("source", "download", "filter", "teacher", "encode", "reference"):
        assert after.config(stage) == before.config(stage), stage
    for stage in ("student", "evaluate", "publish"):
        for student in before.students:
            assert after.config(stage, student) == before.config(stage, student), stage


def test_a_student_of_an_earlier_release_is_another_student(workspace: Path, edit) -> None:
    edit(lambda document: document["students"]["koala-1b"].update(student={"init_from": "releases/koala-1b"}))
    params = load()
    assert params.student("koala-1b").init_from == "releases/koala-1b"
    assert params.student("koala-700m").init_from is None


@pytest.mark.parametrize("stage", ["download", "filter", "encode", "distill", "evaluate"])
def test_a_machines_settings_stand_with_the_machine_only(edit, stage: str) -> None:
    edit(lambda document: document["profiles"]["smoke"][stage].update(machine={}))
    with pytest.raises(KoalaError, match=rf"smoke\.{stage}\.machine: it stands under machines\.NAME: move it there"):
        load()


@pytest.mark.parametrize("stage", ["distill", "evaluate", "publish"])
def test_sampling_stands_with_the_profile_only(edit, stage: str) -> None:
    edit(lambda document: document["profiles"]["smoke"][stage].update(sampling={}))
    with pytest.raises(KoalaError, match=rf"smoke\.{stage}\.sampling: it stands under profiles\.smoke\.sampling"):
        load()


def test_a_machine_that_the_environment_names_must_be_there(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOALA_MACHINE", "laptop")
    with pytest.raises(KoalaError, match=r"^KOALA_MACHINE names the machine 'laptop': choose one of 8xgpu-24gb,"):
        load()


def test_yaml_that_is_none_is_said_with_its_place(workspace: Path) -> None:
    Path("params.yaml").write_text("profile: demo\nprofiles: {demo: [}\n")
    with pytest.raises(KoalaError, match=r"params.yaml is not YAML at line 2, column 19"):
        load()


def test_a_key_that_stands_twice_is_refused_and_one_that_replaces_a_merged_one_is_not(workspace: Path) -> None:
    file = Path("params.yaml")
    text = file.read_text()
    file.write_text(f"{text}profile: demo\n")
    with pytest.raises(KoalaError, match=r"is not YAML at line .*: 'profile' stands twice"):
        load()
    merged = "  one: &one {threads: 1}\n  two: &two {<<: *one, threads: 2}\n  three: {<<: *two, threads: 3}\n"
    file.write_text(text.replace("machines:\n", f"machines:\n{merged}", 1))
    assert [load(machine=name).threads for name in ("one", "two", "three")] == [1, 2, 3]


def test_params_in_another_encoding_are_one_line(workspace: Path) -> None:
    Path("params.yaml").write_bytes(Path("params.yaml").read_bytes() + "# \u00e9\n".encode("latin-1"))
    with pytest.raises(KoalaError, match=r"params\.yaml is not UTF-8 \(.*\): save it as such"):
        load()


def test_a_teacher_without_a_unet_of_any_shape_is_one_line(edit, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (tmp_path / "own" / part).mkdir(parents=True)
        (tmp_path / "own" / part / "config.json").write_text("{}")
    edit(lambda d: d["profiles"]["smoke"].update(teacher={"kind": "folder", "path": str(tmp_path / "own")}))
    with pytest.raises(KoalaError, match=r"profiles\.smoke\.teacher: the config.json of its U-Net gives no U-Net"):
        load()


def test_no_params_and_no_student(workspace: Path) -> None:
    with pytest.raises(KoalaError, match="choose one of koala-1b, koala-700m"):
        load().student("koala-2b")
    Path("params.yaml").unlink()
    with pytest.raises(KoalaError, match=r"no params.yaml here"):
        load()


def test_a_rule_that_its_prompts_cannot_decide_says_so(workspace: Path, edit) -> None:
    """The demo has 108 prompts: enough for a loss of 10 % of a yes/no score, too few for one of 2 %."""
    for profile in DOCUMENT["profiles"]:
        assert load(ROOT / "params.yaml", profile).recipe.unresolved() == [], profile

    def ask(**rule: Any) -> list[str]:
        edit(lambda document: document["profiles"]["demo"]["publish"].update(require=[rule]))
        return load(profile="demo").recipe.unresolved()

    assert ask(metric="attributes/all", of="teacher", at_least=0.98) == [
        "publish.require: attributes/all of teacher at least 0.98: 108 prompts are too few to decide it. A student as good as "
        "its teacher would pass 23% of the time. Evaluate 840 prompts or more, or lower at_least."
    ]
    assert ask(metric="attributes/all", of="teacher", at_least=0.9) == []
    assert (
        ask(metric="attributes/all", of="teacher", at_least=1.0) == []
    )  # better than the teacher: no margin to resolve
    assert ask(metric="attributes/all", at_least=0.98) == []
    # Fewer images than prompts.
    edit(lambda document: document["profiles"]["demo"]["evaluate"].update(count=20))
    assert "20 prompts are too few" in ask(metric="attributes/all", of="teacher", at_least=0.9)[0]


def test_few_step_students_have_no_task_term() -> None:
    """It would pull them towards the mean of all images."""
    for profile in DOCUMENT["profiles"]:
        config = load(ROOT / "params.yaml", profile).distill("koala-1b")
        assert (config.weights.task == 0) is (config.timesteps is not None)


def test_the_schema_in_the_tree_is_current() -> None:
    """Make it anew with: koala params --schema > params.schema.json."""
    assert (ROOT / "params.schema.json").read_text() == json.dumps(parameters.schema(), indent=2) + "\n"
    assert (ROOT / "params.yaml").read_text().startswith("# yaml-language-server: $schema=params.schema.json\n")


def fields(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property of every object in a JSON schema."""
    if isinstance(schema, dict):
        for name, field in (schema.get("properties") or {}).items():
            if isinstance(field, dict):
                yield f"{path}.{name}", field
        for name, each in schema.items():
            yield from fields(each, f"{path}.{name}")
    elif isinstance(schema, list):
        for each in schema:
            yield from fields(each, path)


def test_every_parameter_is_explained() -> None:
    schema = parameters.schema()
    found = list(fields(schema))
    assert len(found) > 100

    def explained(field: dict[str, Any]) -> bool:
        # A field whose words are those of its type carries them there.
        name = str(field.get("$ref", "")).rpartition("/")[2]
        return "description" in field or "description" in schema["$defs"].get(name, {})

    kinds = ("scorers", "rules", "metrics", "targets")
    silent = [path for path, field in found if not explained(field)]
    assert [p for p in silent if p.split(".")[-1] != "kind" and p.split(".")[-2] not in kinds] == []


def kinds_of(config: type[Config]) -> Iterator[type[Config]]:
    for kind in config.__subclasses__():
        yield kind
        yield from kinds_of(kind)


def test_every_field_of_every_configuration_is_explained_below_it() -> None:
    """`kind` aside, which says its own name. A type of the tests' own is none of koala's."""
    configs = {config for config in kinds_of(Config) if config.__module__.startswith("koala.")}
    assert len(configs) > 30
    silent = [
        f"{config.__module__}.{config.__name__}.{name}"
        for config in configs
        for name, field in config.model_fields.items()
        if name != "kind" and not field.description
    ]
    assert silent == []


def test_params_yaml_fits_its_schema() -> None:
    """An editor that checks by the schema finds no fault in what the loader takes."""
    import jsonschema

    jsonschema.validate(DOCUMENT, parameters.schema())
    broken = yaml.safe_load(yaml.safe_dump(DOCUMENT))
    broken["profiles"]["demo"]["filter"]["rules"]["colour"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, parameters.schema())


def test_a_rule_on_a_column_that_is_not_carried_along_is_said_before_any_download(workspace: Path, edit) -> None:
    edit(lambda document: document["profiles"]["smoke"]["filter"]["rules"].update(scores={"at_most": {"beauty": 9}}))
    with pytest.raises(
        KoalaError,
        match=r"filter.rules.scores names 'beauty', which neither .*: choose from aesthetic",
    ):
        load()


@pytest.mark.parametrize(
    ("quota", "said"),
    [
        ({"by": "camera"}, r"filter.quotas.by names 'camera', which neither .*: choose from host, language, aesthetic"),
        ({"by": "host", "best": "host"}, r"filter.quotas.best names 'host', which neither .*: choose from aesthetic"),
    ],
)
def test_a_quota_of_a_column_that_is_not_there_is_said_before_any_download(
    quota: dict, said: str, workspace: Path, edit
) -> None:
    edit(lambda document: document["profiles"]["smoke"]["filter"].update(quotas=[quota | {"at_most": 2}]))
    with pytest.raises(KoalaError, match=said):
        load()


def test_a_pin_stands_in_its_own_file(workspace: Path, edit) -> None:
    """It is the profile's own, and the source's configuration has it."""
    pin = Pin(location="list.csv", files={"list.csv": "sha256:0"}, rows=3)
    pins.write({"smoke": pin, "other": pin.model_copy(update={"rows": 4})})
    assert "pin" not in load().config("source").recipe()  # the demo's pictures need none
    source = {"kind": "file", "location": "list.csv", "score_columns": ["aesthetic"]}
    edit(lambda document: document["profiles"]["smoke"].update(source=source))
    loaded = load()
    assert loaded.source.pin == pin  # type: ignore[attr-defined]
    assert loaded.config("source").recipe()["pin"] == pin.digest
    edit(lambda document: document["profiles"]["smoke"]["source"].update(pin={"location": "x", "files": {}, "rows": 1}))
    with pytest.raises(KoalaError, match=r"profiles.smoke.source.pin: it stands under source.lock.yaml: move it there"):
        load()
