"""Parameters of distillation."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from koala.section import Section

FeatureKind = Literal["self_attention", "cross_attention", "feed_forward", "residual", "last"]


class FeatureConfig(Section):
    """One kind of feature that the student learns to reproduce, and where.

    stages: names (DW1, Mid, UP2 ...); left out: every stage that has the kind.
    layers: of the student's transformers, counted from 0; left out: all. Only kinds of a transformer layer have them.
    match: which of the teacher's transformer layers a shallower student's are compared with.
    after_residual: take attention and feed-forward features after the residual add, not before it.
    """

    kind: FeatureKind
    stages: tuple[str, ...] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    match: Literal["first", "interleaved", "last"] = "first"
    after_residual: bool = False

    @property
    def of_layers(self) -> bool:
        """Whether each transformer layer has one."""
        return self.kind not in ("residual", "last")

    @model_validator(mode="after")
    def _only_of_layers(self) -> Self:
        if not self.of_layers and (self.layers is not None or self.match != "first" or self.after_residual):
            raise ValueError(
                f"{self.kind} is no feature of a transformer layer: leave out layers, match, after_residual"
            )
        return self


class LossWeights(Section):
    """Weights of the objective's terms (KOALA: all 1)."""

    task: float = Field(default=1.0, ge=0)
    output: float = Field(default=1.0, ge=0)
    feature: float = Field(default=1.0, ge=0)


class Computation(Section):
    """How the recipe is computed: speed, memory and what is shown of it, not what is learnt.

    A run that was stopped goes on when these change.

    launch: the accelerate configuration file; how many processes and which devices is its matter alone.
    compile: the transformer layers of both U-Nets, one by one (torch.compile).
    ema_offload: keep the moving average in the host's memory between steps.
    deterministic: on a GPU, kernels whose sums have one order, so that two runs agree to the bit; a CPU's always do.
    """

    launch: str
    micro_batch: int = Field(gt=0, description="images of one forward pass on one device")
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    ema_offload: bool = False
    deterministic: bool = False
    workers: int = Field(default=0, ge=0, description="processes that load data, for each training process")
    checkpoint_every: int = Field(gt=0, description="steps")
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, gt=0, description="steps")
    validate_every: int = Field(gt=0, description="steps between grids of validation images")
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = Field(default=25, gt=0)
    validation_guidance: float = 7.5
    max_bad_steps: int = Field(
        default=10, ge=1, description="stop after this many steps in a row with a non-finite gradient"
    )


class DistillConfig(Computation):
    """The recipe. `batch_size` counts the images of one optimiser step over all processes and accumulated micro-batches.

    features: `koala` (self-attention wherever there is some, and the last feature of stages without transformers),
    `bk-sdm` (the last feature of every stage), or a list.
    timesteps: those that a few-step teacher was made for; left out: all.
    teacher_dtype: of the teacher's U-Net and text encoders. The student's weights are float32.
    teacher_float8: the products of the teacher's transformer layers in float8 (koala.distill.float8).
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0, description="steps")
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    features: Literal["koala", "bk-sdm"] | tuple[FeatureConfig, ...] = "koala"
    weights: LossWeights = LossWeights()
    min_snr_gamma: float | None = Field(default=None, gt=0)
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    teacher_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    teacher_float8: bool = False
    seed: int = 0

    def learnt(self) -> dict[str, Any]:
        """All that decides what is learnt: a run that was stopped goes on only where this is the same."""
        return self.model_dump(mode="json", exclude=set(Computation.model_fields))

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.teacher_float8 and self.teacher_dtype != "bfloat16":
            raise ValueError("teacher_float8 gives bfloat16: set teacher_dtype to bfloat16")
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        return self
