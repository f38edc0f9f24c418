"""What koala's processes import, imported: for servers that tests fork processes from.

transformers compiles a thousand patterns when a process loads its first model: here, for all of them. Objects of imports
are set apart, so that no process looks through them at its collections of garbage.
"""

import gc
import os

from koala.cli import QUIET

os.environ |= QUIET

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import koala.bench.train_worker
import koala.data.download
import koala.data.encode
import koala.data.filter
import koala.data.source
import koala.data.workers
import koala.distill.distill
import koala.distill.train
import koala.evaluate.evaluate
import koala.evaluate.generation
import koala.evaluate.reference
import koala.process
import koala.publish.publish
import koala.runner
import koala.teacher.tiny
import koala.unet.student  # noqa: F401

get_checkpoint_conversion_mapping("clip_text_model")
gc.freeze()
