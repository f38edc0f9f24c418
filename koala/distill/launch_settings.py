"""What an accelerate configuration file says, and which recipes it can run; read before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from koala.distill.config import DistillConfig
from koala.errors import KoalaError


@dataclass(frozen=True)
class LaunchSettings:
    """The part of an accelerate configuration that decides how training is distributed."""

    processes: int
    """Training processes over all machines."""
    machines: int
    sharded: bool
    """Whether FSDP2 shards the student over the processes."""
    mixed_precision: str
    """What autocast computes in: no, bf16 or fp16."""
    use_cpu: bool

    @property
    def bf16(self) -> bool:
        """Whether the student computes in bfloat16."""
        return self.mixed_precision == "bf16"


def read(launch: str) -> LaunchSettings:
    """Read the accelerate configuration `launch`. Raises KoalaError where there is no such file, or it is not YAML."""
    file = Path(launch)
    if not file.is_file():
        raise KoalaError(f"distill.launch names {file}, which is not there: choose one of infra/accelerate/")
    try:
        values = yaml.safe_load(file.read_text())
        return LaunchSettings(
            processes=int(values.get("num_processes") or 1),
            machines=int(values.get("num_machines") or 1),
            sharded=values.get("distributed_type") == "FSDP",
            mixed_precision=str(values.get("mixed_precision") or "no"),
            use_cpu=bool(values.get("use_cpu")),
        )
    except (yaml.YAMLError, AttributeError, ValueError):
        raise KoalaError(f"{file} is no accelerate configuration: choose one of infra/accelerate/") from None


def check(config: DistillConfig) -> LaunchSettings:
    """Return the launch settings of a recipe. Raises KoalaError for a combination that cannot work."""
    machine, settings = config.machine, read(config.machine.launch)
    if settings.mixed_precision not in ("no", "bf16"):
        raise KoalaError(
            f"{machine.launch} asks for {settings.mixed_precision}, whose range the losses leave: "
            "set mixed_precision to bf16 or no"
        )
    if config.batch_size % settings.processes:
        raise KoalaError(
            f"distill.batch_size {config.batch_size} does not divide among the {settings.processes} processes of "
            f"{machine.launch}: make it a multiple of {settings.processes}"
        )
    if settings.sharded:
        if config.optimizer != "adamw":
            raise KoalaError(f"{machine.launch} shards the optimizer's states (FSDP2): set distill.optimizer to adamw")
        for setting, why in (
            ("ema_offload", "the EMA is sharded already"),
            ("channels_last", "FSDP2 shards contiguous parameters only"),
        ):
            if getattr(machine, setting):
                raise KoalaError(f"{machine.launch} shards the student: set distill.{setting} to false ({why})")
    return settings


def micro_batch(config: DistillConfig, processes: int) -> int:
    """Return the images of one forward pass: the largest divisor of a process's share that the machine allows."""
    share = config.batch_size // processes
    return next(size for size in range(min(config.machine.micro_batch, share), 0, -1) if share % size == 0)
