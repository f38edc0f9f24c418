"""What koala's processes import, imported: for servers that tests fork processes from.

transformers compiles a thousand patterns when a process loads its first model: here, for all of them. Objects of imports
are set apart, so that no process looks through them at its collections of garbage, which are a tenth as frequent as Python's
own. Nothing here starts a thread, which no fork would have. A page that a process touches is copied, so that the end of one
passes over what was registered here.
"""

import atexit
import gc
import inspect
import os
import weakref
from importlib import import_module
from unittest.mock import patch

from koala.cli import QUIET

os.environ |= QUIET

import ray
import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

gc.disable()
with patch("atexit.register"):  # it closes what no process of koala leaves open
    import_module("duckdb")
for module in (
    "accelerate.commands.launch",
    "PIL.AvifImagePlugin",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
    "PIL.WebPImagePlugin",
    "diffusers.models.autoencoders.autoencoder_kl",
    "dvc.commands.data_sync",
    "dvc.commands.repro",
    "dvc.repo",
    "dvc_s3",
    "koala.bench.train_worker",
    "koala.data.captions.captioner",
    "koala.data.download",
    "koala.data.encode",
    "koala.data.filter",
    "koala.data.recaption",
    "koala.data.score",
    "koala.data.scores.clip_similarity",
    "koala.data.scores.embedder",
    "koala.data.scores.models",
    "koala.data.source",
    "koala.data.table_reader",
    "koala.data.tables",
    "koala.data.workers",
    "koala.distill.distill",
    "koala.distill.train",
    "koala.evaluate.evaluate",
    "koala.evaluate.generation",
    "koala.evaluate.reference",
    "koala.process",
    "koala.publish.publish",
    "koala.runner",
    "koala.teacher.tiny",
    "koala.unet.student",
    "matplotlib.backends.backend_agg",
    "mlflow.cli",
    "mlflow.server",
    "pandas",
    "polars",
    "prefect.cli",
    "prefect.engine",
    "prefect.server.api.server",
    "prefect.workers.process",
    "pyarrow.dataset",
    "s3fs",
    "torch._inductor.compile_fx",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.blip.image_processing_pil_blip",
    "transformers.models.blip.modeling_blip",
    "transformers.models.blip.processing_blip",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.processing_clip",
    "transformers.models.clip.tokenization_clip",
):
    import_module(module)
get_checkpoint_conversion_mapping("clip_text_model")
# Where each of 6,000 modules lies, which pydantic looks for when a class is made.
inspect.getmodule(inspect.currentframe())
# torch would take back, one by one, each operator that it has registered.
for finalizer in list(weakref.finalize._registry):
    if (found := finalizer.peek()) and found[1] is torch.library._del_library:
        finalizer.detach()
atexit.unregister(torch._dynamo.utils.dump_compile_times)
# Ray looks for a cluster to leave, of which few processes have one.
atexit.unregister(ray._private.worker.shutdown)
atexit.register(lambda: ray.is_initialized() and ray.shutdown(True))
gc.set_threshold(7_000, 20, 20)
gc.enable()
gc.freeze()
