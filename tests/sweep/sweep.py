"""Compare every model type of the installed transformers, tiny and random, with PEFT, one adapter at a time.

`make sweep` runs all of them and writes the results to `peft_multibatch/layers/architectures.json`, which `enable`
reads, and to the page "Architectures" of the docs. `tests/model/test_architectures.py` runs a sample.

Each model gets three adapters on all of its linear layers. If a layer is refused, it is left out, with all layers
of the same name, and the model is tried again; the table lists these layers with the reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import torch
import transformers
from media import FAMILIES
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from sweep.tiny import NotBuilt, Tiny, build, model_types
from torch.utils import _pytree as pytree
from transformers.utils import logging

import peft_multibatch
from peft_multibatch.errors import AdapterIdsLengthError, MultibatchError
from peft_multibatch.layers import architectures
from peft_multibatch.layers.table import choose


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/architectures.csv"
KNOWN = ROOT / "peft_multibatch/layers/architectures.json"
PAGE = ROOT / "docs/architectures.md"
RANKS = {"a": 2, "b": 3, "c": 4}
BATCHES = (  # ids, whether samples have equal lengths, whether in train mode
    (["a", "b", "c"], True, False),
    (["c", "__base__", "a", "a"], True, False),
    (["b", "a", "b", "a", "c"], False, False),
    (["a", "b", "c"], True, True),
)
MOST_LEFT_OUT = 40
NEW_TOKENS = 4
NOT_UNEQUAL = "not with unequal samples"
WITH_MEDIA = {family.model_type for family in FAMILIES.values()}  # whose numbers of images differ in tests

RIGHT, REFUSED, MIXES, UNSEEN, NOT_BUILT, WRONG = (
    "right", "refused", "mixes samples", "nothing to compare", "not built", "WRONG",
)  # fmt: skip

PAGE_HEAD = """# Architectures

<!-- written by `make sweep`, from tests/sweep/sweep.py -->

{types} model types of transformers {version}, each as a tiny random model with three adapters on all of its linear
layers: the base model, and one class with a head. Batches of three and four different samples, of equal and of
unequal length, in eval and in train mode, are compared with PEFT, one adapter at a time, over everything that the
model returns; `generate` token for token. *Right* means that every row equals PEFT's. Adapters on a
refused layer can't be named in a mixed batch; leave these layers out of their targets, or run such adapters one at
a time. For a model that isn't listed, call `mb.verify(...)`. `benchmarks/results/architectures.csv` also has the
errors, and the device that each model ran on.
"""


@dataclass
class Row:
    """The result for one class of a model type."""

    model_type: str
    class_name: str
    status: str
    reason: str = ""
    left_out: dict[str, str] = field(default_factory=dict)  # layers (# stands for numbers) → why
    generates: str = ""
    notes: list[str] = field(default_factory=list)
    media: bool = False  # right with adapters in the parts that encode images, videos or audio
    error: float = 0.0
    device: str = "cpu"
    seconds: float = 0.0


def pattern(name: str) -> str:
    """Return a layer's name without numbers, the same for all layers of a stack."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def with_adapters(model: Any, left_out: Iterable[str]) -> Any:
    """Add three adapters to all linear layers, except those that match patterns."""
    names = {pattern(name): [] for name, _ in model.named_modules()}
    for name, _ in model.named_modules():
        names[pattern(name)].append(name)
    excluded = [name for each in left_out for name in names.get(each, [])]
    adapted = None
    for adapter, rank in RANKS.items():
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=excluded or None,
            init_lora_weights=False,
        )  # fmt: skip
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=adapter)
        else:
            adapted.add_adapter(adapter, config)
    return adapted.eval()


def layer_in(message: str, names: Iterable[str]) -> str | None:
    """Return the layer that a message names."""
    words = {word.strip("()'\",:;") for word in message.split()}
    return max((name for name in names if name in words), key=len, default=None)


def sweep(model_type: str, head: bool, device: str = "cpu") -> Row:
    """Try one class of a model type."""
    begin = time.perf_counter()
    try:
        tiny = build(model_type, head)
    except NotBuilt as error:
        return Row(model_type, "head" if head else "base", NOT_BUILT, str(error))
    is_unequal = (tiny.recipe.unequal_images and tiny.recipe.placeholders) or model_type in WITH_MEDIA
    has_media = is_unequal and any(
        architectures.encodes_media(tiny.model, name) for name, _ in tiny.model.named_modules()
    )
    for is_known in (True, False) if has_media else (False,):
        row = Row(model_type, tiny.class_name, RIGHT, device=device)
        with mock.patch.object(
            architectures, "media", lambda known=is_known: frozenset({model_type} if known else ())
        ):
            for _ in range(MOST_LEFT_OUT):
                tiny.model.to(device)
                again = _try(tiny, row)
                if not again:
                    break
                tiny = build(model_type, head)
        row.media = is_known and row.status == RIGHT and not any(NOT_UNEQUAL in note for note in row.notes)
        row.media = row.media and not any(architectures.encodes_media(tiny.model, name) for name in row.left_out)
        if row.media:
            break
        tiny = build(model_type, head)
    row.seconds = time.perf_counter() - begin
    return row


def _try(tiny: Tiny, row: Row) -> bool:
    """Compare with PEFT; returns whether a layer was refused, so that the model has to be tried again."""
    try:
        model = with_adapters(tiny.model, row.left_out)
    except (ValueError, TypeError) as error:  # PEFT's error for a model without linear layers left
        unfit = re.search(r"Module '(\w+)' is incompatible", str(error))
        names = [name for name, _ in tiny.model.named_modules() if unfit and name.rpartition(".")[2] == unfit[1]]
        if any(pattern(name) not in row.left_out for name in names):
            row.left_out |= {pattern(name): "PEFT doesn't let it have adapters" for name in names}
            return True
        is_first = not row.left_out
        row.status = NOT_BUILT if is_first else REFUSED
        row.reason = f"PEFT: {_first_line(error)}" if is_first else "no linear layer is left"
        return False
    names = [name for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
    try:
        for name in names:
            refusal = choose(name, model.get_base_model().get_submodule(name), model.get_base_model()).refusal
            if refusal:
                row.left_out[pattern(name)] = _without_name(refusal, name)
        if any(pattern(name) in row.left_out for name in names):
            return True
        mb = peft_multibatch.enable(model)
        for ids, equal, trains in BATCHES:
            model.train(trains)
            inputs = _moved(tiny.inputs(len(ids), equal=equal), tiny.model.device)
            problem = _plain_problem(model, inputs)
            if problem:
                row.notes += [f"{'not in train mode' if trains else NOT_UNEQUAL}: {problem}"] * (
                    problem not in str(row.notes)
                )
                continue
            found = mb.verify(**inputs, adapter_ids=ids)
            row.error = max([row.error, *(each.error for each in found.outputs)])
            if found.ok:
                continue
            problems = [f"{each.name}: {each.problem}" for each in found.layers if each.problem][:1]
            is_mixed = any("several samples" in each.note for each in found.outputs)
            if is_mixed and not any(each.wrong for each in found.outputs):
                if trains:  # as in batch norm
                    row.notes.append("not in train mode: samples are mixed")
                    continue
                row.status = MIXES
            elif not problems and not any(each.is_seen or each.wrong for each in found.outputs):
                row.status = UNSEEN
            else:
                row.status = WRONG
            row.reason = " / ".join([f"{ids} {equal=} {trains=}", *str(found).splitlines()[1:4], *problems])
            return False
        model.eval()
        row.generates = _generates(tiny, model) if tiny.generates else ""
    except MultibatchError as error:
        name = layer_in(str(error), names)
        if name is None and not equal:
            row.notes.append(f"{NOT_UNEQUAL}: {str(error).split(': expected')[0]}")
            row.generates = ""
            return False
        if name is None or pattern(name) in row.left_out:
            row.status, row.reason = REFUSED, str(error)
            if isinstance(error, AdapterIdsLengthError):
                row.reason = "it takes the patches of all images in one row, and not one row for each sample"
            return False
        row.left_out[pattern(name)] = _without_name(str(error), name)
        return True
    except Exception as error:
        alone = [problem for name in RANKS if (problem := _plain_problem(model, inputs, name))]
        row.status = UNSEEN if alone else WRONG
        row.reason = alone[0] if alone else f"{type(error).__name__}: {_first_line(error)} at {_where(error)}"
        return False
    if row.generates == WRONG:
        row.status, row.reason = WRONG, "generate differs from PEFT"
    return False


def _generates(tiny: Tiny, model: Any) -> str:
    """Whether `generate` matches each sample's adapter alone."""
    ids = ["c", "a", "__base__", "a"]
    inputs = _moved(tiny.inputs(len(ids), equal=False), tiny.model.device)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        model.generate(**inputs, **options)
    except TypeError:  # the class sets some of these itself
        return ""
    mixed = model.generate(**inputs, **options, adapter_ids=ids)
    for sample, name in enumerate(ids):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**inputs, **options)
        else:
            model.set_adapter(name)
            alone = model.generate(**inputs, **options)
        if not torch.equal(mixed[sample], alone[sample]):
            return MIXES if _mixes_in_generate(tiny, model, options) else WRONG
    return RIGHT


def _mixes_in_generate(tiny: Tiny, model: Any, options: dict[str, Any]) -> bool:
    """Whether samples affect each other in the base model, too."""
    inputs = _moved(tiny.inputs(4, equal=True), tiny.model.device)
    other = {
        name: value[[0, 1, 2, 2]] if isinstance(value, torch.Tensor) and len(value) == 4 else value
        for name, value in inputs.items()
    }
    with model.disable_adapter():
        first, second = (
            model.generate(**each, **options, output_logits=True, return_dict_in_generate=True).logits
            for each in (inputs, other)
        )
    return any((one[:3] - two[:3]).abs().max() > 1e-4 * one.abs().max() for one, two in zip(first, second))


def _moved(inputs: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), inputs)


def _plain_problem(model: Any, inputs: dict[str, Any], name: str = "a") -> str:
    """Return the reason why PEFT itself can't run a batch with an adapter; empty if it can."""
    model.set_adapter(name)
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _without_name(refusal: str, name: str) -> str:
    return refusal.split(": expected")[0].replace(name, "it", 1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False


def _one(job: tuple[str, bool, str]) -> Row:
    _quiet()
    try:
        return sweep(*job)
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)} at {_where(error)}"
        return Row(job[0], "head" if job[1] else "base", NOT_BUILT, reason)


def publish(rows: list[Row]) -> None:
    """Write the results: for `enable`, as CSV, and as a page of the docs."""
    rows = sorted(rows, key=lambda row: (row.model_type, row.class_name))
    sound = {row.model_type for row in rows if row.status in (RIGHT, REFUSED, MIXES)}
    tried = sorted(sound - {row.model_type for row in rows if row.status == WRONG})
    media = {row.model_type for row in rows if row.media} - {
        row.model_type for row in rows if row.status not in (NOT_BUILT, UNSEEN) and not row.media
    }
    versions = {"transformers": transformers.__version__, "tried": tried, "media": sorted(media)}
    KNOWN.write_text(json.dumps(versions, indent=1) + "\n")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([each.name for each in fields(Row)])
        for row in rows:
            left_out = "; ".join(f"{layer}: {why}" for layer, why in row.left_out.items())
            rest = row.media, f"{row.error:.1e}", row.device, f"{row.seconds:.1f}"
            writer.writerow([*astuple(row)[:4], left_out, row.generates, "; ".join(row.notes), *rest])
    counts = Counter(_result(row) for row in rows)
    types = {row.model_type for row in rows if row.status not in (UNSEEN, NOT_BUILT)}
    lines = [
        PAGE_HEAD.format(types=len(types), version=transformers.__version__),
        *(f"- {count} × {result}" for result, count in counts.most_common()),
        "",
        "| model type | class | result | `generate` | refused layers, or why |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.status == NOT_BUILT and row.model_type in types:  # a type with only one class
            continue
        why: dict[str, list[str]] = {}
        for layer, reason in row.left_out.items():
            why.setdefault(reason, []).append(f"`{layer}`")
        notes = [f"{', '.join(layers)}: {reason}" for reason, layers in why.items()]
        notes += [row.reason] * bool(row.reason) + row.notes
        cells = [f"`{row.model_type}`", row.class_name, _result(row), row.generates or "–", "<br>".join(notes)]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def _cell(text: str) -> str:
    """Format a table cell: brackets must not become links, and levels of smallness are removed."""
    return re.sub(r"([|\[\]])", r"\\\1", re.sub(r" \[\d, \d, \w+\]$", "", text)).replace("\n", " ")


def _result(row: Row) -> str:
    return "right, some layers refused" if row.status == RIGHT and row.left_out else row.status


def run(wanted: list[tuple[str, bool, str]], jobs: int, file: TextIO | None) -> list[Row]:
    """Try classes of model types in separate processes, and write each row when it is available."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=40) as pool:
        for row in pool.imap_unordered(_one, wanted):
            rows.append(row)
            if file is not None:
                print(json.dumps(asdict(row)), file=file, flush=True)
            what = row.model_type, row.class_name, row.status, row.generates, row.reason[:300], *row.left_out
            print(f"{row.seconds:5.1f}s", *what, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to try; all of them by default, which are published")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path, help="where to keep rows while it runs, as JSON lines")
    arguments = parser.parse_args()
    wanted = [(name, head, arguments.device) for name in arguments.types or model_types() for head in (False, True)]
    with arguments.rows.open("w") if arguments.rows else contextlib.nullcontext() as file:
        rows = run(wanted, arguments.jobs, file)
    if not arguments.types:
        publish(rows)
    wrong = [f"{row.model_type} {row.class_name}: {row.reason}" for row in rows if row.status == WRONG]
    sys.exit("\n".join(["wrong:", *wrong]) if wrong else None)


if __name__ == "__main__":
    main()
