"""One rank of ``test_database.py``: prints the configurations that it takes. ``python _ranks.py RANK WORLD PORT``."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

rank, world, port = map(int, sys.argv[1:4])

from fastft.autotune import database, store  # noqa: E402
from fastft.kernels import load, rms_norm  # noqa: E402

load()
database.device_kind = lambda device=None: "h100"  # type: ignore[assignment]
key = (torch.device("cpu"), torch.bfloat16, 8192, 4096)
alone = rms_norm.FORWARD(*key)  # before there is a group: each rank's own
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
database.share()
together = rms_norm.FORWARD(*key)
dist.barrier()
print(json.dumps({"alone": alone["BLOCK_M"], "together": together["BLOCK_M"], "problems": store.problems()}))
dist.destroy_process_group()
