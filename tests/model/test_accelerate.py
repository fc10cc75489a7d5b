"""examples/accelerate_generate.py on several processes: interrupted, restarted and given invalid input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from models import alone, peft_model
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import accelerate_generate  # noqa: E402


ADAPTERS = ["three", "four", "eight"]
WANTED = ["eight", None, "three", "four", "three", None, "eight"]
ROWS = [
    {"prompt": " ".join(f"w{(7 * row + step) % 150}" for step in range(1 + 3 * row % 5)), "adapter": name, "id": row}
    for row, name in enumerate(WANTED)
]
NEW_TOKENS = 6

# Runs the example; the process whose rank is the second argument dies after its first batch, in the middle of a line.
DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import accelerate_generate, typer
victim, append = sys.argv.pop(1), accelerate_generate.append

def append_and_die(part, rows, completions):
    append(part, rows, completions)
    if os.environ["RANK"] == victim:
        part.write(b'{"row": 0, "compl')
        part.flush()
        os.kill(os.getpid(), signal.SIGKILL)

accelerate_generate.append = append_and_die
typer.run(accelerate_generate.main)
"""

# Several jobs in one launch, because importing takes most of the time. They share the process group.
JOBS = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import accelerate_generate

accelerate_generate.PartialState.destroy_process_group = lambda self: None
folder = pathlib.Path(sys.argv[3])
for name in sys.argv[4:]:
    files = {"input": folder / f"{name}.jsonl", "out": folder / f"{name}.out.jsonl"}
    accelerate_generate.main(**files, **json.loads(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with adapters and a word tokenizer, saved in folders."""
    folder = tmp_path_factory.mktemp("saved")
    model = peft_model()
    model.save_pretrained(folder / "adapters")
    model.unload().save_pretrained(folder / "model")
    words = WordLevel({word: index for index, word in enumerate(["pad", *(f"w{n}" for n in range(159))])}, "pad")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="pad").save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(saved):
    """PEFT's completions, one prompt and one adapter at a time."""
    return answers_of_peft(saved, "cpu")


def answers_of_peft(saved, device):
    tokenizer = AutoTokenizer.from_pretrained(saved / "model")
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    model = PeftModel.from_pretrained(model, saved / "adapters" / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(saved / "adapters" / name, adapter_name=name)
    model.to(device).eval()
    answers = []
    for row in ROWS:
        inputs = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False).to(device)
        call = partial(model.generate, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens = alone(model, row["adapter"], call)[0, inputs["input_ids"].shape[1] :]
        answers.append({**row, "completion": tokenizer.decode(tokens, skip_special_tokens=True)})
    return answers


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(saved, **more):
    adapter = [f"{name}={saved / 'adapters' / name}" for name in ADAPTERS]
    return {"model": str(saved / "model"), "adapter": adapter, "max_new_tokens": NEW_TOKENS, "batch_size": 2, **more}


def run(saved, input, out, **more):
    """Run the example in this process alone."""
    try:
        accelerate_generate.main(input=input, out=out, cpu=True, **options(saved, **more))
    finally:
        PartialState._reset_state()


def launch(processes, *script):
    """Run a script on several processes; returns its exit code and output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    command += ["--main_process_port", 0]  # picks a free one
    done = subprocess.run([str(part) for part in [*command, *script]], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def command_line(saved, input, out):
    pairs = (options(saved) | {"input": input, "out": out}).items()
    each = [(name, value) for name, values in pairs for value in (values if isinstance(values, list) else [values])]
    return [part for name, value in each for part in ("--" + name.replace("_", "-"), value)]


def killed_then_finished(saved, folder, expected, processes):
    """Kill one process, and let the next run finish the job; returns the interrupted run's files."""
    input, out = write(folder / "in.jsonl", ROWS), folder / "out.jsonl"
    dying = folder / "dying.py"
    dying.write_text(DYING)
    begin = time.monotonic()
    arguments = command_line(saved, input, out)
    code, said = launch(processes, dying, EXAMPLES, 1, *arguments, "--batch-size", 1)
    seconds = time.monotonic() - begin
    assert code != 0 and "exitcode  : -9" in said and "Signal 9 (SIGKILL)" in said, said
    assert seconds < 120 and not out.exists()
    left = accelerate_generate.finished(folder / "out.jsonl.partial")
    assert left and all(expected[row]["completion"] == completion for row, completion in left.items())
    copy = folder / "copy.jsonl"
    copy.with_name("copy.jsonl.job.json").write_bytes((folder / "out.jsonl.job.json").read_bytes())
    (folder / "copy.jsonl.partial").mkdir()
    for part in (folder / "out.jsonl.partial").iterdir():
        (folder / "copy.jsonl.partial" / part.name).write_bytes(part.read_bytes())
    code, said = launch(processes, EXAMPLES / "accelerate_generate.py", *arguments, "--group-by-adapter")
    assert code == 0, said
    assert read(out) == expected
    assert not (folder / "out.jsonl.partial").exists()
    return input, copy, left


def test_a_killed_process_ends_the_job_and_the_next_run_does_the_rest(saved, expected, tmp_path, monkeypatch):
    input, copy, left = killed_then_finished(saved, tmp_path, expected, 2)
    asked = []
    complete = accelerate_generate.complete

    def spy(model, tokenizer, prompts, *rest, **ids):
        asked.extend(prompts)
        return complete(model, tokenizer, prompts, *rest, **ids)

    monkeypatch.setattr(accelerate_generate, "complete", spy)
    run(saved, input, copy)  # the same leftovers, with another number of processes
    assert read(copy) == expected
    assert sorted(asked) == sorted(row["prompt"] for index, row in enumerate(ROWS) if index not in left)


def test_fewer_rows_than_processes(saved, expected, tmp_path):
    (tmp_path / "jobs.py").write_text(JOBS)
    for rows in (1, 0):
        write(tmp_path / f"{rows}.jsonl", ROWS[:rows])
    code, said = launch(2, tmp_path / "jobs.py", EXAMPLES, json.dumps(options(saved)), tmp_path, 1, 0)
    assert code == 0, said
    assert read(tmp_path / "1.out.jsonl") == expected[:1]
    assert read(tmp_path / "0.out.jsonl") == []


def test_nothing_to_do(saved, expected, tmp_path, monkeypatch, capsys):
    input, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    run(saved, input, out)
    assert read(out) == expected
    before = out.stat()
    monkeypatch.setattr(accelerate_generate, "load", None)
    run(saved, input, out)
    assert out.stat() == before and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_another_job_is_not_mixed_with_what_is_there(saved, tmp_path, finished, monkeypatch):
    input, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    run(saved, input, out)
    if not finished:
        out.unlink()
        (tmp_path / "out.jsonl.partial").mkdir()
    monkeypatch.setattr(accelerate_generate, "load", None)
    with pytest.raises(SystemExit, match=r"differs in: max_new_tokens\. Expected"):
        run(saved, input, out, max_new_tokens=7)
    with pytest.raises(SystemExit, match=r"differs in: adapters, dtype\. Expected"):
        run(saved, input, out, dtype="bfloat16", adapter=[*options(saved)["adapter"][::2], "four=elsewhere"])
    with pytest.raises(SystemExit, match=r"differs in: input\. Expected"):
        run(saved, write(tmp_path / "in.jsonl", ROWS[1:]), out)
    (tmp_path / "out.jsonl.job.json").unlink()
    with pytest.raises(SystemExit, match="with its settings doesn't: expected both or neither"):
        run(saved, input, out)


def test_a_changed_adapter_is_another_job(saved, tmp_path):
    before = accelerate_generate.state_of(str(saved / "adapters" / "three"))
    file = saved / "adapters" / "three" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content)
    assert accelerate_generate.state_of(str(saved / "adapters" / "three")) != before


def test_files_beside_the_job_are_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = accelerate_generate.state_of("")  # the demo's model, which isn't a folder
    accelerate_generate.begin({"model": before}, Path("out.jsonl"))
    accelerate_generate.begin({"model": accelerate_generate.state_of("")}, Path("out.jsonl"))


def test_the_folder_of_the_output_is_there(saved, tmp_path):
    input = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(SystemExit, match=r"nowhere/out\.jsonl: expected a file in an existing folder"):
        run(saved, input, tmp_path / "nowhere" / "out.jsonl")


def test_every_row_has_one_completion(tmp_path):
    """The model's own generation config must not ask for several sequences."""
    with accelerate_generate.part_of(0, tmp_path) as part, pytest.raises(ValueError, match="longer"):
        accelerate_generate.append(part, [{"row": 0}], ["w1", "w2"])


@pytest.mark.parametrize(
    "line, message",
    [
        (
            '{"prompt": "w1", "adapter": "five"}',
            "line 3: \"adapter\" is 'five': expected one of three, four, eight, or",
        ),
        ('{"prompt": "w1"}', "line 3: \"adapter\" is 'missing'"),
        ('{"prompt": "w1", "adapter": ["three"]}', r"line 3: \"adapter\" is \['three'\]"),
        ('{"prompt": "w1", "adap', "line 3: expected one JSON object per line, but Unterminated string"),
        (r'{"prompt": "\ud800", "adapter": null}', "line 3: expected one JSON object per line, but .*surrogates"),
        ('["w1", "three"]', 'line 3: expected an object with a non-empty string "prompt"'),
        ('{"prompt": "", "adapter": null}', 'line 3: expected an object with a non-empty string "prompt"'),
        ('{"prompt": "w1", "adapter": null, "completion": "w2"}', 'line 3: has a "completion"'),
    ],
)
def test_a_line_that_can_not_be_run_is_named_before_anything_is(saved, tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(accelerate_generate, "load", None)
    input = write(tmp_path / "in.jsonl", ROWS[:1])
    input.write_text(input.read_text() + "\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(SystemExit, match=message):
        run(saved, input, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [input]


@pytest.mark.parametrize("adapter", ["path", "=path", "__base__=path", "three=path"])
def test_adapters_need_names_of_their_own(saved, tmp_path, adapter):
    with pytest.raises(SystemExit, match="expected NAME=PATH, with a name that isn't used twice"):
        run(saved, tmp_path / "in.jsonl", tmp_path / "out.jsonl", adapter=["three=path", adapter])


def test_one_run_at_a_time(tmp_path):
    message = "rank-0.jsonl is being written by another process: expected one run"
    with (
        accelerate_generate.part_of(0, tmp_path),
        pytest.raises(SystemExit, match=message),
        accelerate_generate.part_of(0, tmp_path),
    ):
        pass


def test_processes_that_stand_still_are_not_waited_for(tmp_path):
    with accelerate_generate.part_of(1, tmp_path) as part:
        progress = accelerate_generate.Progress(tmp_path, 3)
        accelerate_generate.append(part, [{"row": 0}], ["w1"])
        with pytest.raises(
            SystemExit, match=r"2 rows of other processes are missing, and none was finished within 0\.1 seconds"
        ):
            progress.wait(patience=0.1)


def test_shares():
    """Shares have long prompts first, balanced over processes; or as few adapters each as possible."""
    rows = [{"prompt": "x" * length, "adapter": "ab"[length % 2]} for length in range(1, 8)]
    lengths = [len(row["prompt"]) for row in accelerate_generate.in_shares(rows, 2, False)]
    assert lengths == [7, 5, 3, 1, 6, 4, 2]  # split_between_processes gives the first process four of seven
    assert [row["adapter"] for row in accelerate_generate.in_shares(rows, 2, True)] == [*"aaabbbb"]


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("processes", [2, 4])
def test_on_several_gpus(saved, tmp_path, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices, found {torch.cuda.device_count()}")
    killed_then_finished(saved, tmp_path, answers_of_peft(saved, "cuda"), processes)
