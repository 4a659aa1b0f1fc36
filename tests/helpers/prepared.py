"""What a rank needs, imported once: the fork server of `launch_ranks` loads this, and every rank is a fork of it.

Nothing here may start a thread, for a fork takes none along: torch is loaded, and no tensor touched. (pyarrow has one that
returns memory, whose allocator minds forks.)
"""

import contextlib
import gc
import os

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # read when torch is loaded

import pyarrow.compute
import pyarrow.parquet  # noqa: F401 - and to this
import pytest  # noqa: F401 - the main module of who asks for ranks, which multiprocessing loads in each of them
import torch
import torch._dynamo
import torch._inductor.compile_fx  # DistributedDataParallel and DeepSpeed come to it in their first step
import torch.distributed.checkpoint
import torch.distributed.fsdp

import tarflow.trainer.train  # noqa: F401
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.zero import import_deepspeed

with contextlib.suppress(TrainerError):  # it is optional
    import_deepspeed(torch.device("cpu"))

gc.collect()
gc.freeze()  # of the forks none scans, and so copies, what is loaded: a full collection took a second
