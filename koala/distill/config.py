"""Parameters of distillation."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from koala.config import Config
from koala.evaluate.config import SamplingConfig

FeatureKind = Literal["self_attention", "cross_attention", "feed_forward", "residual", "last"]
Dtype = Literal["float32", "float16", "bfloat16"]
Compiled = Literal["BasicTransformerBlock", "ResnetBlock2D"]


class FeatureConfig(Config):
    """One kind of feature that the student learns to reproduce, and where."""

    kind: FeatureKind
    """Which feature: the output of an attention or feed-forward layer, of a residual block, or the last of a stage."""
    stages: tuple[str, ...] | None = None
    """Names of stages (DW1, Mid, UP2, ...); left out: every stage that has the kind."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indices of the student's transformer layers, from 0; left out: all. Only kinds of a transformer layer have them."""
    match: Literal["first", "interleaved", "last"] = "first"
    """Which of the teacher's transformer layers a shallower student's are compared with."""
    after_residual: bool = False
    """Take attention and feed-forward features after the residual add instead of before it."""

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


class LossWeights(Config):
    """Weights of the objective's terms (KOALA: all 1)."""

    task: float = Field(default=1.0, ge=0)
    """Weight of the error against the noise that was added. A few-step teacher's student takes 0: the noise is no
    answer that few steps can give, and this term would pull the student towards the mean of all answers."""
    output: float = Field(default=1.0, ge=0)
    """Weight of the error against the teacher's output."""
    feature: float = Field(default=1.0, ge=0)
    """Weight of every stage's feature term."""


class DistillMachine(Config):
    """Settings that change speed, memory or logging, but not what is trained. They may change while a run is interrupted."""

    launch: str = "infra/accelerate/cpu.yaml"
    """The accelerate configuration file; it alone sets the number of processes, the devices and the autocast dtype."""
    micro_batch: int = Field(default=8, gt=0)
    """Images of one forward pass on one device at most; the largest divisor of a process's share of the batch is taken."""
    gradient_checkpointing: bool = False
    """Compute the student's blocks again in the backward pass instead of keeping their activations."""
    compile: tuple[Compiled, ...] = ()
    """Classes of diffusers whose modules are compiled one by one in both U-Nets (torch.compile): transformer layers, residual
    blocks. Each shape is compiled once: for a bucket of SDXL's, layers take half a minute, residual blocks twice as long."""
    channels_last: bool = False
    """Keep both U-Nets' convolutions in NHWC. Slower where it was measured (docs/benchmarks.md): torch's group norm writes NCHW.
    Not with FSDP2, which shards contiguous parameters only."""
    ema_offload: bool = False
    """Keep the EMA in the host's memory between steps."""
    deterministic: bool = False
    """On a GPU, use kernels that add in one order, so that two runs agree to the bit. A CPU's always do."""
    workers: int = Field(default=0, ge=0)
    """Processes that load data, for each training process."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that are kept."""
    checkpoints: str | None = Field(default=None, pattern=r"^s3://[^/?#]+(/[^?#]*)?$")
    """Where checkpoints go besides, as `s3://bucket/prefix`, for machines that share no disk: a stage whose machine was lost
    resumes from there on another. The last two are kept, under the name of the work folder. Left out: nowhere."""
    checkpoints_minutes: float = Field(default=10, ge=0)
    """Minutes between checkpoints that go to `checkpoints`: what a lost machine costs at most, beside `checkpoint_every`."""
    log_every: int = Field(default=10, gt=0)
    """Steps between logged losses."""
    validate_every: int = Field(default=1000, gt=0)
    """Steps between grids of validation images, and between measurements of held-out samples."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Stop after this many steps in a row with a non-finite gradient."""


class DistillConfig(Config):
    """The recipe of distillation."""

    untracked: ClassVar[frozenset[str]] = frozenset({"machine", "sampling"})

    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Images of one optimizer step, over all processes and accumulated micro-batches."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up. A run of a constant rate can be extended: more `steps` continue it."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw: fused AdamW; adamw-8bit: AdamW with 8-bit states (bitsandbytes)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm to which gradients are clipped."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the EMA of the weights, which is released in place of the last weights; left out: no EMA."""
    features: Literal["koala", "bk-sdm"] | tuple[FeatureConfig, ...] = "koala"
    """koala: self-attention wherever there is some, and the last feature of stages without transformers. bk-sdm: the last
    feature of every stage. Or a list of features."""
    weights: LossWeights = LossWeights()
    """Weights of the objective's terms."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Gamma of Min-SNR weighting (Hang et al. 2023) of task and output terms; left out: no weighting."""
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Timesteps that a few-step teacher was made for; left out: all."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained on the unconditional input, which classifier-free guidance needs."""
    recaption_share: float = Field(default=0.0, ge=0, le=1)
    """Share of samples trained on the caption that the stage `recaption` wrote, where it wrote one, in place of their own. Drawn
    anew at each step."""
    teacher_dtype: Dtype = "float32"
    """Dtype of the teacher's U-Net and text encoders. The student's weights are float32."""
    teacher_float8: bool = False
    """Compute the matrix products of the teacher's transformer layers in float8 (koala.distill.float8)."""
    held_out: int = Field(default=0, ge=0)
    """Encoded samples that are kept out of training. The losses on them are logged whenever validation images are generated."""
    seed: int = 0
    """Seed of the order of samples, the noise, the timesteps, the caption dropout, the choice of captions and what is held out."""
    sampling: SamplingConfig = SamplingConfig()
    """How validation images are generated. Not tracked: it does not change what is trained."""
    machine: DistillMachine = DistillMachine()
    """Settings of speed, memory and logging. Not tracked."""

    def resume_key(self) -> dict[str, Any]:
        """Return what decides every step: a run at a constant rate continues when only `steps` grows."""
        key = self.recipe()
        if self.schedule == "constant":
            del key["steps"]
        return key

    def of_work(self, name: str) -> Self:
        """Return the recipe with the checkpoints in S3 under the name of the work folder: each training has its own."""
        if self.machine.checkpoints is None:
            return self
        machine = self.machine.model_copy(update={"checkpoints": f"{self.machine.checkpoints.rstrip('/')}/{name}"})
        return self.model_copy(update={"machine": machine})

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.teacher_float8 and self.teacher_dtype != "bfloat16":
            raise ValueError("teacher_float8 gives bfloat16: set teacher_dtype to bfloat16")
        return self
