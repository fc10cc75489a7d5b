"""Complete a file of prompts, each with its adapter, with one process per GPU.

    accelerate launch --num_processes 2 examples/accelerate_generate.py --input prompts.jsonl --out answers.jsonl \\
        --model path/to/model --adapter sql=path/to/sql --adapter poet=path/to/poet
    python examples/accelerate_generate.py    # a trial: the demo's model and prompts, compared with PEFT

A line of the input is `{"prompt": "LOVE, n.", "adapter": "devil"}`, where null stands for the base model; other keys
are kept. Without `--model`, it uses SmolLM2-135M with the demo's three adapters. On a machine without GPUs, start
processes with `accelerate launch --multi_gpu --num_processes 2`: given `--cpu`, accelerate starts only one.

Every process appends its finished rows to its own file in OUT.partial. After an interruption, run the same command
again, with any number of processes, to complete the missing rows. At the end the first process writes OUT, in the
order of the input; OUT.job.json records the settings. All processes, even on different machines, must see these files.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, tqdm
from transformers.utils import logging

import peft_multibatch
from peft_multibatch.demo.model import ADAPTERS_DIR
from peft_multibatch.demo.prompts import complete, hold_to_peft, load, named_paths, read_requests, replace
from peft_multibatch.demo.run import ADAPTERS, PROMPTS


def state_of(path: str) -> Any:
    """Return a value that changes when a model or adapter on disk is modified."""
    if not path or not Path(path).is_dir():  # an empty path stands for the demo's model, not the current folder
        return path
    stats = {file.name: file.stat() for file in sorted(Path(path).iterdir()) if file.is_file()}
    return [path, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items())]


def begin(job: dict[str, Any], out: Path) -> Path:
    """Record the job's settings, or check that existing files belong to the same job; returns the folder for parts."""
    if not out.parent.is_dir():
        raise SystemExit(f"--out {out}: expected a file in an existing folder.")
    note, parts = (out.with_name(out.name + ending) for ending in (".job.json", ".partial"))
    if note.exists():
        before = json.loads(note.read_text())
        differ = [key for key in job if before.get(key) != job[key]]
        if differ:
            raise SystemExit(
                f"{note} belongs to a job that differs in: {', '.join(differ)}. Expected the same job, because old "
                f"and new rows would be mixed. Choose another --out, or remove {note}, {parts} and {out}."
            )
    elif out.exists() or parts.exists():
        raise SystemExit(
            f"{out if out.exists() else parts} exists, but {note} with its settings doesn't: expected both or "
            "neither. Choose another --out, or remove it."
        )
    else:
        replace(note, json.dumps(job, indent=1))
    if out.exists():
        shutil.rmtree(parts, ignore_errors=True)  # left if a run was interrupted between the last two steps
    else:
        parts.mkdir(exist_ok=True)
    return parts


def finished(parts: Path) -> dict[int, str]:
    """Read the completions of all processes and runs, by row; incomplete lines are ignored."""
    found: dict[int, str] = {}
    for path in sorted(parts.glob("rank-*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                row = json.loads(line)
                found.setdefault(row["row"], row["completion"])
    return found


def missing_rows(requests: list[dict[str, Any]], found: dict[int, str]) -> list[dict[str, Any]]:
    return [
        {"row": index, "prompt": row["prompt"], "adapter": row["adapter"] or "__base__"}
        for index, row in enumerate(requests)
        if index not in found
    ]


def merge(requests: list[dict[str, Any]], parts: Path, out: Path) -> None:
    """Write the output in the order of the input, and remove the parts."""
    found = finished(parts)
    if missing := missing_rows(requests, found):  # processes of an earlier run may still be writing
        raise SystemExit(f"{len(missing)} rows are missing. Run the same command again to complete them.")
    answers = ({**row, "completion": found[index]} for index, row in enumerate(requests))
    replace(out, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    shutil.rmtree(parts, ignore_errors=True)
    print(f"{out}: {len(requests)} rows")


@contextmanager
def part_of(rank: int, parts: Path) -> Iterator[BinaryIO]:
    """Open and lock the file of one process, after removing an incomplete last line."""
    path = parts / f"rank-{rank}.jsonl"
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"{path} is being written by another process: expected one run of a job at a time. Wait until the "
                "other one has finished."
            ) from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append(part: BinaryIO, rows: list[dict[str, Any]], completions: list[str]) -> None:
    for row, completion in zip(rows, completions, strict=True):
        part.write(json.dumps({"row": row["row"], "completion": completion}).encode() + b"\n")
    part.flush()
    os.fsync(part.fileno())


class Progress:
    """The main process's progress bar over the rows of all processes; reads only new lines."""

    def __init__(self, parts: Path, total: int) -> None:
        self.parts, self.read = parts, dict[Path, int]()
        self.bar = tqdm(total=total, unit="row")
        self.update()

    def update(self) -> int:
        new = 0
        for path in self.parts.glob("rank-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self.read.setdefault(path, 0))
                data = file.read()
            new += data.count(b"\n")
            self.read[path] += data.rfind(b"\n") + 1
        self.bar.update(new)
        return new

    def wait(self, patience: float) -> None:
        """Wait until all rows are finished, as long as the other processes make progress."""
        last = time.monotonic()
        while self.bar.n < self.bar.total:
            time.sleep(0.2)
            if self.update():
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                raise SystemExit(
                    f"{self.bar.total - self.bar.n} rows of other processes are missing, and none was finished within "
                    f"{patience:g} seconds. Run the same command again to complete them, with a larger --patience if "
                    "a batch takes longer."
                )
        self.bar.close()


def in_shares(rows: list[dict[str, Any]], processes: int, group_by_adapter: bool) -> list[dict[str, Any]]:
    """Sort rows so that equal slices are the processes' shares: long prompts first, or grouped by adapter."""
    rows = sorted(rows, key=lambda row: -len(row["prompt"]))  # longest first, to run out of memory early if at all
    if group_by_adapter:
        return sorted(rows, key=lambda row: row["adapter"])
    return [row for rank in range(processes) for row in rows[rank::processes]]


def trial_files() -> tuple[Path, Path]:
    """Write the demo's prompts to an input file; returns its path and one for the output."""
    folder = Path(tempfile.mkdtemp())
    rows = ({"prompt": prompt, "adapter": None if name == "__base__" else name} for name, prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl", folder / "answers.jsonl"


def main(
    input: Path | None = None,
    out: Path | None = None,
    model: str = "",
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH; repeatable")] = None,
    dtype: str = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    group_by_adapter: Annotated[bool, typer.Option("--group-by-adapter", help="fewer adapters per batch")] = False,
    patience: Annotated[float, typer.Option(help="seconds to wait for progress of other processes")] = 1800,
    cpu: Annotated[bool, typer.Option("--cpu")] = False,
) -> None:
    """Complete the prompts of INPUT, each with its adapter, into OUT."""
    trial = out is None
    if (input is None) != trial or bool(model) != bool(adapter) or (trial and model):
        raise SystemExit("expected --input with --out, and --model with --adapter, or none of them for a trial.")
    logging.disable_progress_bar()
    adapters = named_paths(adapter or [f"{name}={ADAPTERS_DIR / name}" for name in ADAPTERS])
    state = PartialState(cpu=cpu or not torch.cuda.is_available())

    # One process decides which rows are missing. After that, no collective could hang because a process died.
    plan: list[Any] = [None]
    if state.is_main_process:
        if input is None or out is None:
            input, out = trial_files()
        requests = read_requests(input, adapters)
        job = {
            "input": hashlib.sha256(input.read_bytes()).hexdigest(),
            "model": state_of(model),
            "adapters": {name: state_of(path) for name, path in adapters.items()},
            "dtype": dtype,
            "max_new_tokens": max_new_tokens,
        }
        parts = begin(job, out)
        if out.exists():
            print(f"{out} is complete: nothing to do")
        else:
            missing = missing_rows(requests, finished(parts))
            plan = [(parts, in_shares(missing, state.num_processes, group_by_adapter))]
    broadcast_object_list(plan)
    state.wait_for_everyone()
    state.destroy_process_group()
    if plan[0] is None:
        return

    parts, missing = plan[0]
    with state.split_between_processes(missing) as share:
        mine = share
    if not mine and not state.is_main_process:
        return
    with part_of(state.process_index, parts) as part:
        progress = Progress(parts, len(requests)) if state.is_main_process else None
        if mine:
            loaded, tokenizer = load(model, adapters, dtype, state.device)
            peft_multibatch.enable(loaded)
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            prompts, ids = [row["prompt"] for row in batch], [row["adapter"] for row in batch]
            append(part, batch, complete(loaded, tokenizer, prompts, max_new_tokens, adapter_ids=ids))
            if progress is not None:
                progress.update()
        if progress is None:
            return
        progress.wait(patience)
        merge(requests, parts, out)
    if trial:
        hold_to_peft(loaded, tokenizer, [*map(json.loads, out.read_bytes().splitlines())], max_new_tokens)
        shutil.rmtree(out.parent)


if __name__ == "__main__":
    typer.run(main)
