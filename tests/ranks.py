"""Tests on several ranks: one launch of torchrun runs all cases of a file, and pytest reports each."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


HERE = Path(__file__).parent


def launch(file: str, backend: str, folder: Path, ranks: int = 2) -> dict[str, str]:
    """Run a file on several ranks; returns the error of each case, or the empty string."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # transformers splits models over GPUs if there are any
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*command, file, backend, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    reports = [folder / f"rank{rank}.json" for rank in range(ranks)]
    assert all(report.exists() for report in reports), done.stdout[-3000:] + done.stderr[-6000:]
    found = [json.loads(report.read_text()) for report in reports]
    return {case: "\n".join(filter(None, (each.get(case, "did not run") for each in found))) for case in found[0]}


def launched(file: str, backend: str) -> Any:
    """Return a fixture with the results of `launch`, once for all tests of a file."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory):
        return launch(file, backend, tmp_path_factory.mktemp(backend))

    return found


def report(error: str) -> None:
    """Fail with the errors of the ranks."""
    if error:
        pytest.fail(error, pytrace=False)


def main(cases: list[Callable[[Path, torch.device], None]]) -> None:
    """Run all cases on every rank, even if some fail."""
    backend, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as in conftest.py
    dist.init_process_group(backend, timeout=timedelta(seconds=60))  # a rank that waits in vain fails its case
    found = {}
    for case in cases:
        try:
            torch.manual_seed(0)
            case(folder, device)
            found[case.__name__] = ""
        except Exception:
            found[case.__name__] = f"rank {rank}: {traceback.format_exc()}"
        (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
