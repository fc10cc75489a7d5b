"""Draw the chart of the README and the documentation's home page from committed CSVs.

    python benchmarks/overview.py

Left: new tokens per second in continuous batching, by number of adapters, next to vLLM (results/continuous_vllm.csv).
Right: time of `generate` for a batch of 32 prompts with 32 adapters, in multiples of the base model's time
(results/end_to_end.csv, the commit below). The halves are drawn side by side, and stacked for narrow screens.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMIT = "7097db7"
OURS, OTHER, BASE = "#00695c", "#9e9e9e", "#cfd8dc"
SERVED = {"peft_multibatch": ("peft_multibatch", OURS), "vLLM": ("vLLM 0.23", OTHER)}
WAYS = {
    "base": ("base model,\nno adapters", BASE),
    "peft_multibatch": ("peft_multibatch", OURS),
    "PEFT adapter_names": ("PEFT, mixed batch\n(adapter_names)", OTHER),
    "PEFT, one at a time": ("PEFT, one adapter\nafter the other", OTHER),
}


def read(name: str) -> list[dict[str, str]]:
    """Read the rows of a CSV in ``results``."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def throughput(layers: int = 32) -> dict[str, dict[int, float]]:
    """Return new tokens per second of each method, by number of adapters."""
    found: dict[str, dict[int, float]] = {way: {} for way in SERVED}
    for row in read("continuous_vllm.csv"):
        if int(row["layers"]) == layers:
            found[row["way"]][int(row["adapters"])] = float(row["tokens_per_s"])
    return found


def times() -> dict[str, float]:
    """Return the time of ``generate`` with 32 adapters in a batch of 32, in multiples of the base model's."""
    return {
        row["way"]: float(row["generate32_s × base"])
        for row in read("end_to_end.csv")
        if (row["batch"], row["adapters"], row["commit"]) == ("32", "32", COMMIT) and row["way"] in WAYS
    }


def draw(path: Path, is_narrow: bool = False) -> None:
    """Write the chart; the narrow version, for phones, stacks its halves."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 10 if is_narrow else 12, "axes.titleweight": "bold"})
    rows, columns, size = (2, 1, (5.6, 8.4)) if is_narrow else (1, 2, (12, 4.4))
    figure, (left, right) = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for index, (way, points) in enumerate(throughput().items()):
        label, colour = SERVED[way]
        places = [place + 0.4 * index - 0.2 for place in range(len(points))]
        bars = left.bar(places, list(points.values()), 0.38, color=colour, label=label)
        left.bar_label(bars, [f"{value:,.0f}" for value in points.values()], padding=2)
    left.set_xticks(range(len(points)), [f"{n} adapters" if n else "base model alone" for n in points])
    left.set_title("Serving 256 requests:\nnew tokens per second (more is better)")
    left.set_ylim(0, 6800)
    left.legend(frameon=False, loc="upper right")

    found = times()
    names = [way for way in WAYS if way in found][::-1]
    bars = right.barh(
        [WAYS[way][0] for way in names], [found[way] for way in names], color=[WAYS[way][1] for way in names]
    )
    right.bar_label(bars, [f"{found[way]:.1f} ×" for way in names], padding=4)
    right.set_title("32 prompts in one batch, each with its own adapter:\ntime of generate (less is better)")
    right.set_xlim(0, 1.18 * max(found.values()))
    right.set_xlabel("multiples of the base model's time")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.tick_params(axis="x", length=0)
    left.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    right.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder for the images")
    folder = parser.parse_args().out
    draw(folder / "throughput.png")
    draw(folder / "throughput-narrow.png", is_narrow=True)
