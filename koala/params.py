"""Reads params.yaml into frozen types. The types stand beside the code that uses them; the values in params.yaml.

    params = load()
    params.config("distill", "koala-700m").steps

Every union of kinds stands here: a new filter rule, metric or release target is its own file and one name below. The whole
file is validated at once, so that a misspelt name anywhere is refused before the first stage has done any work.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from koala import params_file
from koala.config import BY_KIND, Config
from koala.data import forget, pins
from koala.data.captions.config import RecaptionConfig, RecaptionMachine
from koala.data.config import (
    DownloadConfig,
    DownloadMachine,
    EncodeConfig,
    EncodeMachine,
    FilterConfig,
    FilterMachine,
    SourceConfig,
)
from koala.data.rules.ascii import Ascii
from koala.data.rules.aspect import Aspect
from koala.data.rules.blank import Blank
from koala.data.rules.blocklist import Blocklist
from koala.data.rules.boilerplate import Boilerplate
from koala.data.rules.characters import Characters
from koala.data.rules.control import Control
from koala.data.rules.language import Language
from koala.data.rules.markup import Markup
from koala.data.rules.personal import Personal
from koala.data.rules.repetition import Repetition
from koala.data.rules.scores import Scores
from koala.data.rules.size import Size
from koala.data.rules.urls import Urls
from koala.data.rules.words import Words
from koala.data.scores.aesthetic import Aesthetic
from koala.data.scores.clip_similarity import ClipSimilarity
from koala.data.scores.config import ScoreConfig, ScoreMachine
from koala.data.scores.nsfw import Nsfw
from koala.data.scores.text import TextArea, TextStrings
from koala.data.tables import TableSource
from koala.demo.attributes import Attributes
from koala.demo.images import Shapes
from koala.demo.prompts import ShapesPrompts
from koala.demo.table import ShapesSource
from koala.distill import launch_settings
from koala.distill.config import DistillConfig, DistillMachine
from koala.distill.features import feature_pairs
from koala.errors import KoalaError
from koala.evaluate.config import COSTS, EvaluateConfig, EvaluateMachine, SamplingConfig
from koala.evaluate.metrics.b_vqa import BVqa
from koala.evaluate.metrics.clip_score import ClipScore
from koala.evaluate.metrics.cmmd import Cmmd
from koala.evaluate.metrics.dino_cosine import DinoCosine
from koala.evaluate.metrics.fd_dinov2 import FdDinov2
from koala.evaluate.metrics.hps_v21 import HpsV21
from koala.evaluate.metrics.pick_score import PickScore
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompt_files import FilePrompts, HubPrompts
from koala.evaluate.statistics import power, prompts_needed, resolvable, yes_no_spread
from koala.publish import approvals
from koala.publish.config import PublishConfig
from koala.publish.targets.folder import FolderTarget
from koala.publish.targets.hub import HubTarget
from koala.publish.targets.s3 import S3Target
from koala.teacher.config import FileTeacher, FolderTeacher, HubTeacher, TinyTeacher
from koala.unet.blocks import StudentRule, keep
from koala.unet.config import StudentConfig
from koala.watch import WatchConfig

FILE = Path("params.yaml")
MACHINE = "KOALA_MACHINE"
"""Environment variable that names the machine in place of params.yaml, so that each worker pool has its own."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name of folders, of stages and of models in the registry, where `/`, `@` and spaces mean something else."""


class _TinyTeacher(TinyTeacher):
    images: Shapes
    """Captioned images that it is trained on."""


Source = Annotated[TableSource | ShapesSource, Field(discriminator="kind")]
Teacher = Annotated[HubTeacher | FolderTeacher | FileTeacher | _TinyTeacher, Field(discriminator="kind")]
Rule = Annotated[
    Words
    | Characters
    | Repetition
    | Control
    | Markup
    | Urls
    | Boilerplate
    | Personal
    | Language
    | Ascii
    | Blocklist
    | Size
    | Aspect
    | Blank
    | Scores,
    Field(discriminator="kind"),
]
Scorer = Annotated[Aesthetic | ClipSimilarity | Nsfw | TextArea | TextStrings, Field(discriminator="kind")]
Prompts = Annotated[FilePrompts | HubPrompts | ShapesPrompts, Field(discriminator="kind")]
Metric = Annotated[
    Attributes | BVqa | ClipScore | Cmmd | DinoCosine | FdDinov2 | HpsV21 | PickScore | Psnr,
    Field(discriminator="kind"),
]
Target = Annotated[FolderTarget | HubTarget | S3Target, Field(discriminator="kind")]


class _Filter(FilterConfig):
    rules: Annotated[tuple[Rule, ...], BY_KIND] = ()
    """Rules by kind, `{words: {at_least: 4}}`: the first that a sample breaks is the one it is counted under."""


class _Score(ScoreConfig):
    scorers: Annotated[tuple[Scorer, ...], BY_KIND] = ()
    """Scores by kind, `{clip_similarity: {}}`, a column each."""


class _Evaluate(EvaluateConfig):
    prompts: Prompts
    """Prompts that images are generated from."""
    metrics: Annotated[tuple[Metric, ...], BY_KIND]
    """Metrics of image quality by kind, `{psnr: {}}`."""


class _Publish(PublishConfig):
    targets: Annotated[tuple[Target, ...], BY_KIND] = ()
    """Where a release is sent, by kind, `{folder: {path: /mnt/releases}}`; left out: it stays where it is made."""


class Profile(Config):
    """What is made: a complete recipe of the pipeline, one section a stage."""

    requires: tuple[Literal["cuda", "hub"], ...] = ()
    """What the profile needs of a machine: see koala.requirements."""
    sampling: SamplingConfig
    """How images are generated: by validation, by evaluation and in the card's example."""
    source: Source
    """Where the table of URLs and captions comes from."""
    download: DownloadConfig
    """How images are fetched and resized."""
    score: _Score = _Score()
    """Which scores are computed of the images; left out: none."""
    filter: _Filter
    """Which samples are kept."""
    recaption: RecaptionConfig = RecaptionConfig()
    """Which model captions the kept images anew; left out: none."""
    teacher: Teacher
    """Where the teacher comes from."""
    encode: EncodeConfig
    """How kept images become latents."""
    distill: DistillConfig
    """The recipe of distillation."""
    evaluate: _Evaluate
    """What is measured."""
    publish: _Publish
    """What a student must reach to be released, and where it goes."""

    @model_validator(mode="after")
    def _scores_are_there(self) -> Self:
        computed = [scorer.kind for scorer in self.score.scorers]
        if twice := {*computed} & {*self.source.score_columns}:
            raise ValueError(f"score.scorers computes {min(twice)!r}, which the source carries along too: take one out")
        there = (*self.source.score_columns, *computed)
        for rule in self.filter.rules:
            named = [*rule.at_least, *rule.at_most] if isinstance(rule, Scores) else []
            if absent := [column for column in named if column not in there]:
                raise ValueError(
                    f"filter.rules.scores names {absent[0]!r}, which neither source.score_columns nor score.scorers gives: "
                    f"choose from {', '.join(there) or 'nothing'}"
                )
        columns = ("host", "language", *there, *getattr(self.source, "carry", ()))
        for quota in self.filter.quotas:
            for name, choices in (("by", columns), ("best", there)):
                if (column := getattr(quota, name)) and column not in choices:
                    raise ValueError(
                        f"filter.quotas.{name} names {column!r}, which neither the source nor the scorers give: "
                        f"choose from {', '.join(choices) or 'nothing'}"
                    )
        return self

    @model_validator(mode="after")
    def _rules_fit_metrics(self) -> Self:
        shared = [name for name, column in self.evaluate.columns().items() if column.of_teacher]
        for rule in self.publish.require:
            choices = shared if rule.of else [*self.evaluate.scores(), *COSTS]
            if rule.metric not in choices:
                share = f" of the {rule.of}" if rule.of else ""
                raise ValueError(
                    f"publish.require names {rule.metric!r}{share}, which evaluate.metrics does not measure: "
                    f"choose from {', '.join(choices) or 'nothing'}"
                )
        return self

    def unresolved(self) -> list[str]:
        """Return a line for each rule on a share of the teacher's score for which there are too few prompts.

        Raises KoalaError where the prompts cannot be read.
        """
        columns, lines = self.evaluate.columns(), []
        rules = [rule for rule in self.publish.require if rule.of and rule.at_least is not None and rule.at_least < 1]
        for rule in rules:
            least, column = float(rule.at_least or 0), columns[rule.metric]
            spread = yes_no_spread(least) if column.yes_no else column.spread
            prompts = min(self.evaluate.count, len({prompt.text for prompt in self.evaluate.prompts.load()}))
            if spread is not None and not resolvable(least, spread, prompts):
                passes, needed = power(least, spread, prompts), prompts_needed(least, spread)
                lines.append(
                    f"publish.require: {rule}: {prompts} prompts are too few to decide it. A student as good as its teacher "
                    f"would pass {passes:.0%} of the time. Evaluate {needed} prompts or more, or lower at_least."
                )
        return lines


class Machine(Config):
    """How it is computed: settings of speed and memory that change nothing of what is made."""

    threads: int | None = Field(default=None, ge=1)
    """OpenMP threads of a process, unless OMP_NUM_THREADS says otherwise; left out: one for each core. Threads wait for each
    other by spinning: with small models, one thread more than there are idle cores makes all of them several times slower."""
    download: DownloadMachine = DownloadMachine()
    """Of `koala download`."""
    score: ScoreMachine = ScoreMachine()
    """Of `koala score`."""
    filter: FilterMachine = FilterMachine()
    """Of `koala filter`."""
    recaption: RecaptionMachine = RecaptionMachine()
    """Of `koala recaption`."""
    encode: EncodeMachine = EncodeMachine()
    """Of `koala encode`."""
    distill: DistillMachine = DistillMachine()
    """Of `koala distill`."""
    evaluate: EvaluateMachine = EvaluateMachine()
    """Of `koala reference` and `koala evaluate`."""


class StudentOptions(Config):
    """What else than the rule its weights depend on."""

    init_from: str | None = None
    """See koala.unet.config."""


class Student(Config):
    """A row of `students`: the U-Net's rule and, where it wants, other values of the recipe."""

    unet: StudentRule
    """Which of the teacher's blocks it keeps."""
    student: StudentOptions = StudentOptions()
    """Where its first weights come from."""
    distill: dict[str, Any] = Field(default_factory=dict)
    """Values of the profile's section `distill` that this student has otherwise."""


class Document(Config):
    """All of params.yaml."""

    profile: str
    """The profile that stages run: what is made."""
    machine: str
    """The machine that they run on: how it is computed. KOALA_MACHINE in the environment takes its place."""
    watch: WatchConfig = WatchConfig()
    """When the flow `watch` retrains, apart from a change of the source."""
    students: dict[Name, Student]
    """Students by name."""
    profiles: dict[Name, Profile]
    """Profiles by name."""
    machines: dict[Name, Machine]
    """Machines by name."""


@dataclass(frozen=True)
class Params:
    """The chosen profile on the chosen machine."""

    profile: str
    machine: str
    students: Mapping[str, StudentConfig]
    requires: tuple[str, ...]
    recipe: Profile
    watch: WatchConfig
    _machine: Machine
    _distill: Mapping[str, DistillConfig]
    _approvals: tuple[approvals.Approval, ...]
    _forget: tuple[forget.Forgotten, ...]
    _pin: pins.Pin | None

    @property
    def threads(self) -> int | None:
        """OpenMP threads of a process on this machine."""
        return self._machine.threads

    def student(self, name: str) -> StudentConfig:
        """Return the student called `name`. Raises KoalaError with the names that there are."""
        if name not in self.students:
            raise KoalaError(f"no student {name!r} in {FILE}: choose one of {', '.join(self.students)}")
        return self.students[name]

    def distill(self, student: str) -> DistillConfig:
        """Return the recipe of a student on this machine. Raises KoalaError for an unknown student."""
        self.student(student)
        return self._distill[student]

    @property
    def source(self) -> SourceConfig:
        """Where the table comes from, at its pin if it has one."""
        section = self.recipe.source
        return section.model_copy(update={"pin": self._pin}) if isinstance(section, TableSource) else section

    @property
    def publish(self) -> PublishConfig:
        """What a student must reach to be released, with the verdicts that a person overruled."""
        return self.recipe.publish.model_copy(update={"sampling": self.recipe.sampling, "approvals": self._approvals})

    def config(self, stage: str, student: str | None = None) -> Config:
        """Return the configuration of a stage, with this machine's settings and the profile's sampling in it."""
        if stage == "student":
            return self.student(str(student))
        if stage == "distill":
            return self.distill(str(student))
        if stage == "publish":
            return self.publish
        if stage == "source":
            return self.source
        section: Config = getattr(self.recipe, "evaluate" if stage == "reference" else stage)
        shared: dict[str, Any] = {
            "machine": getattr(self._machine, "evaluate" if stage == "reference" else stage, None)
        }
        shared |= {"sampling": self.recipe.sampling, "forget": self._forget}
        return section.model_copy(update={name: shared[name] for name in shared if name in type(section).model_fields})


def load(path: Path = FILE, profile: str | None = None, machine: str | None = None) -> Params:
    """Read `path`; `profile` and `machine` take the place of those that it names.

    Raises KoalaError, in one line, where the file is missing, is not YAML or does not fit the types, and where the chosen
    machine cannot run the chosen profile.
    """
    values = params_file.read(path)
    try:
        document = Document.model_validate(values)
    except ValidationError as error:
        raise KoalaError(params_file.complaints(path, error)) from None
    name = _chosen("--profile" if profile else path, "profile", profile or document.profile, document.profiles)
    by = "--machine" if machine else MACHINE if os.environ.get(MACHINE) else path
    host = _chosen(by, "machine", machine or os.environ.get(MACHINE) or document.machine, document.machines)
    recipe, chosen = document.profiles[name], document.machines[host]
    for section in Profile.model_fields:
        homes = {
            "machine": "machines.NAME",
            "sampling": f"profiles.{name}.sampling",
            "approvals": str(approvals.FILE),
            "forget": str(forget.FILE),
            "pin": str(pins.FILE),
        }
        for field, home in homes.items():
            if field not in getattr(getattr(recipe, section), "model_fields_set", ()):
                continue
            raise KoalaError(f"{path}: profiles.{name}.{section}.{field}: it stands under {home}: move it there")
    students = {
        each: StudentConfig(unet=row.unet, init_from=row.student.init_from) for each, row in document.students.items()
    }
    distill = {each: _recipe(path, each, values, name, recipe, chosen) for each in students}
    for each, config in distill.items():
        _check(path, name, each, config, students[each], recipe)
    standing = approvals.read(), forget.read(), pins.read().get(name)
    return Params(name, host, students, recipe.requires, recipe, document.watch, chosen, distill, *standing)


def schema() -> dict[str, Any]:
    """Return the JSON schema of params.yaml, by which editors complete and check it."""
    found = Document.model_json_schema()
    partial = dict(found["$defs"]["DistillConfig"])
    partial.pop("required")
    found["$defs"]["Student"]["properties"]["distill"] = partial
    for section, field in (
        ("_Score", "scorers"),
        ("_Filter", "rules"),
        ("_Evaluate", "metrics"),
        ("_Publish", "targets"),
    ):
        properties = found["$defs"][section]["properties"]
        properties[field] = _mapping_schema(properties[field], found["$defs"])
    return found


def _mapping_schema(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a union's list as params.yaml writes it: a mapping of kinds to their options (BY_KIND)."""
    kinds = {}
    for each in field["items"].get("oneOf", [field["items"]]):
        definition = definitions[each["$ref"].rpartition("/")[2]]
        kinds[definition["properties"]["kind"]["const"]] = {"anyOf": [each, {"type": "null"}]}
    return {
        "type": "object",
        "description": field["description"],
        "properties": kinds,
        "additionalProperties": False,
    }


def _chosen(by: Path | str, what: str, name: str, there_are: Mapping[str, Config]) -> str:
    if name not in there_are:
        raise KoalaError(f"{by} names the {what} {name!r}: choose one of {', '.join(there_are)}")
    return name


def _recipe(
    path: Path, student: str, values: Mapping[str, Any], profile: str, recipe: Profile, machine: Machine
) -> DistillConfig:
    """Return the profile's recipe with the student's own values over it, this machine's settings in it."""
    own = values["students"][student].get("distill") or {}
    if taken := {"machine", "sampling"} & set(own):
        raise KoalaError(f"{path}: students.{student}.distill.{min(taken)}: a student has none of its own: take it out")
    try:
        config = DistillConfig.model_validate({**values["profiles"][profile]["distill"], **own})
    except ValidationError as error:
        raise KoalaError(params_file.complaints(path, error, ("students", student, "distill"))) from None
    return config.model_copy(update={"machine": machine.distill, "sampling": recipe.sampling})


def _check(path: Path, profile: str, name: str, config: DistillConfig, student: StudentConfig, recipe: Profile) -> None:
    """Refuse features that the student lacks, and a recipe that the machine's launch file cannot run."""
    teacher = recipe.teacher.shape().unet
    try:
        feature_pairs(config.features, keep(teacher, student.unet))
    except KoalaError as error:
        raise KoalaError(f"{path}: profiles.{profile}.distill.features: {name}: {error}") from None
    except (LookupError, TypeError) as error:
        raise KoalaError(
            f"{path}: profiles.{profile}.teacher: the config.json of its U-Net gives no U-Net ({error!r}): restore it"
        ) from None
    launch_settings.check(config)
