"""A pipeline on this machine's disk: a folder, or a single file in SDXL's original layout."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.console import hide_loading_bars, say
from koala.errors import KoalaError
from koala.teacher.embedded import is_embedded, load_part, unpack
from koala.teacher.layout import MODEL_INDEX, MODELS, configurations, licence, read_index, weights
from koala.teacher.shape import read_json
from koala.teacher.source import Source, place, save_weights

if TYPE_CHECKING:
    import torch

SDXL_REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
"""Where a single file's configurations and tokenizers come from, if no folder is named and the file does not hold them."""

_UNET = "model.diffusion_model."
# A key of each part that tells SDXL's original layout from any other. A VAE may be left out of a file.
_PREFIXES = {
    "unet": (_UNET,),
    "text_encoder": ("conditioner.embedders.0.transformer.",),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
    "vae": ("first_stage_model.", "vae."),
}
_KEYS = {
    "unet": (f"{_UNET}label_emb.0.0.weight",),
    "text_encoder": ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",),
    "text_encoder_2": ("conditioner.embedders.1.model.positional_embedding",),
    "vae": ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
}


class FolderSource:
    """A pipeline's folder, which is only read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def configurations(self, to: Path) -> None:
        """Copy model_index.json, configurations, vocabularies and the licence into the folder `to`."""
        if self._folder.is_file():
            raise KoalaError(f"the teacher's {self._folder} is a file, not a folder: set `kind: file`")
        if not self._folder.is_dir():
            raise KoalaError(f"there is no teacher at {self._folder}: give the folder of a pipeline")
        parts = read_index(self._folder, str(self._folder))
        files = configurations(self._files(), parts) | licence([file.name for file in self._folder.glob("LICENSE*")])
        place({MODEL_INDEX: MODEL_INDEX} | files, self._folder, to)

    def weights(self, to: Path, parts: Collection[str]) -> None:
        """Copy the weights of `parts` into `to`."""
        files: dict[str, str] = {}
        for part in parts:
            files |= weights(self._files(), part, str(self._folder))
        place(files, self._folder, to)

    def _files(self) -> list[str]:
        return sorted(file.relative_to(self._folder).as_posix() for file in self._folder.glob("*/*") if file.is_file())


class FileSource:
    """A single .safetensors file.

    Its configurations and tokenizers come from the source that is named for them, or else from the file itself, if koala
    wrote it, or else from `default`.
    """

    def __init__(self, file: Path, named: Source | None, default: Source) -> None:
        self._file = file
        self._named, self._default = named, default

    def configurations(self, to: Path) -> None:
        """Write the configurations into the folder `to`.

        Raises KoalaError if there is no such file.
        """
        if self._file.is_dir():
            raise KoalaError(f"the teacher's {self._file} is a folder, not a file: set `kind: folder`")
        if not self._file.is_file():
            raise KoalaError(f"there is no teacher at {self._file}: give a .safetensors file of SDXL's original layout")
        if self._named is None and is_embedded(self._file):
            unpack(self._file, to)
        else:
            (self._named or self._default).configurations(to)

    def weights(self, to: Path, parts: Collection[str]) -> None:
        """Convert the weights of `parts` to diffusers' names in `to`, each part in the dtype that it has in the file.

        Raises KoalaError if the file lacks a part, holds another kind of model, or does not fit the configurations in `to`.
        """
        import torch
        from diffusers import StableDiffusionXLPipeline

        dtypes = self._check(to, parts)
        say(f"teacher: converting {self._file}")
        hide_loading_bars()
        if is_embedded(self._file):
            for part in parts:
                config = read_json(to / part / "config.json")
                save_weights(load_part(self._file, part, config, dtypes[part] or torch.float32), to / part)
            return
        # One dtype for all parts needs no detour. float32 holds every value of the others.
        common = {dtype for dtype in dtypes.values() if dtype}
        try:
            pipeline = StableDiffusionXLPipeline.from_single_file(
                str(self._file),
                config=str(to),
                dtype=common.pop() if len(common) == 1 else torch.float32,
                local_files_only=True,
                add_watermarker=False,
                **{name: None for name in MODELS if name not in parts},
            )
        except NotImplementedError:  # torch's, of a tensor that got no values
            raise KoalaError(f"{self._misfit()}: it lacks tensors that they name") from None
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise KoalaError(f"{self._misfit()} ({' '.join(str(error).split())[:160]})") from None
        for part in parts:
            model = getattr(pipeline, part)
            missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
            if missing:
                raise KoalaError(f"{self._misfit()}: the {part} lacks {len(missing)} tensors, such as {min(missing)}")
            if part == "unet" and (more := self._count - len(model.state_dict())) > 0:
                raise KoalaError(f"{self._misfit()}: the file's U-Net has {more} tensors more")
            save_weights(model.to(dtypes[part] or torch.float32), to / part)

    def _misfit(self) -> str:
        return (
            f"{self._file} does not fit the configurations of its pipeline: "
            "set `config` to the folder of a pipeline of the same shape"
        )

    def _check(self, to: Path, parts: Collection[str]) -> "dict[str, torch.dtype | None]":
        """Return the dtype of each part in the file, or None where its tensors have several.

        Raises KoalaError for a file that lacks a part, or that is trained for another objective than the scheduler in
        `to` says: front ends mark that by empty tensors, which diffusers does not read.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file, "pt") as tensors:
                names = list(tensors.keys())
                metadata = tensors.metadata() or {}
                found: defaultdict[str, set[Any]] = defaultdict(set)
                for part in parts:
                    for name in names:
                        if name.startswith(_PREFIXES[part]):
                            found[part].add(tensors.get_slice(name).get_dtype())
        except (OSError, SafetensorError) as error:
            raise KoalaError(f"{self._file} is not a safetensors file ({error}): fetch it again") from None
        for part in parts:
            if not set(names).intersection(_KEYS[part]):
                remedy = "set `vae` to one of the Hub" if part == "vae" else "give a whole checkpoint"
                raise KoalaError(
                    f"{self._file} lacks SDXL's {part} in the original layout ({_KEYS[part][0]}): {remedy}"
                )
        self._count = sum(name.startswith(_UNET) for name in names)
        if "edm_mean" in names:
            raise KoalaError(
                f"{self._file} is trained with EDM's noise (it holds edm_mean), where koala distils only epsilon and "
                "v_prediction: choose another teacher"
            )
        scheduler = read_json(to / "scheduler" / "scheduler_config.json")
        v_prediction = "v_pred" in names or metadata.get("modelspec.prediction_type") == "v"
        if v_prediction and scheduler.get("prediction_type") != "v_prediction":
            raise KoalaError(
                f"{self._file} is trained for v_prediction, where its scheduler says {scheduler.get('prediction_type')}: "
                "set `scheduler: {prediction_type: v_prediction}`"
            )
        if "ztsnr" in names and not scheduler.get("rescale_betas_zero_snr"):
            raise KoalaError(
                f"{self._file} is trained with zero terminal SNR, where its scheduler has none: "
                "set `scheduler: {rescale_betas_zero_snr: true, timestep_spacing: trailing}`"
            )
        if any(dtype.startswith("F8") for dtypes in found.values() for dtype in dtypes):
            raise KoalaError(f"{self._file} holds float8 weights: give the file in float16, bfloat16 or float32")
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        dtypes = {part: dtypes & set(kinds) for part, dtypes in found.items()}
        return {part: kinds[dtypes[part].pop()] if len(dtypes[part]) == 1 else None for part in parts}
