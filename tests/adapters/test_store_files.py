"""Invalid adapter files raise a typed error when they are registered, and don't affect other adapters."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import base_model, lora_configs
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from stored import CONFIG, WEIGHTS, edit_config, edit_tensors, save, save_all

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters.store import layouts, paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def shared():
    model = base_model()
    mb = peft_multibatch.enable(model)
    return mb.adapter_store(max_host_memory="10MB", max_rank=8)


@pytest.fixture
def adapter(saved, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(saved / "eight", tmp_path / "eight")


def header_of(folder):
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(folder, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(change):
    def spoil(folder):
        header, data = header_of(folder)
        change(header, next(key for key in header if key != "__metadata__"))
        write(folder, header, data)

    return spoil


def swap_first(folder):
    header, data = header_of(folder)
    header.pop("__metadata__", None)
    first, second = sorted(header, key=lambda key: header[key]["data_offsets"])[:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    write(folder, header, data)


def twice(folder):
    header, data = header_of(folder)
    key = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    write(folder, text.encode(), data)


def only_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def pipe(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def directory(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def change_weights(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def change_config(text):
    return lambda folder: (folder / CONFIG).write_bytes(text)


DAMAGED = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no configuration": lambda folder: (folder / CONFIG).unlink(),
    "only a pickle": only_pickle,
    "a pipe": pipe,
    "a directory": directory,
    "a byte too few": change_weights(lambda raw: raw[:-1]),
    "a byte too many": change_weights(lambda raw: raw + b"\0"),
    "cut in the header": change_weights(lambda raw: raw[:100]),
    "empty": change_weights(lambda raw: b""),
    "seven bytes": change_weights(lambda raw: raw[:7]),
    "a header without end": change_weights(lambda raw: b"\xff" * 8 + raw[8:]),
    "a header longer than the file": change_weights(lambda raw: struct.pack("<Q", len(raw) - 7) + raw[8:]),
    "no JSON": lambda folder: write(folder, b"{" + b" " * 30, b""),
    "a list": lambda folder: write(folder, [], b""),
    "not UTF-8": lambda folder: write(folder, b"\xff\xfe", b""),
    "deep": lambda folder: write(folder, b"[" * 200_000, b""),
    "a number without end": lambda folder: write(folder, b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "a name twice": twice,
    "tensors on top of each other": swap_first,
    "a hole": edit_header(lambda header, key: header.pop(key)),
    "integers": edit_header(lambda header, key: header[key].update(dtype="I32")),
    "another dtype": edit_header(lambda header, key: header[key].update(dtype="F16")),
    "no dtype": edit_header(lambda header, key: header[key].pop("dtype")),
    "an unhashable dtype": edit_header(lambda header, key: header[key].update(dtype=["F32"])),
    "a negative size": edit_header(lambda header, key: header[key].update(shape=[-8, -48])),
    "a size that is no integer": edit_header(lambda header, key: header[key].update(shape=[8.0, 48])),
    "a true size": edit_header(lambda header, key: header[key].update(shape=[True, 384])),
    "a huge size": edit_header(lambda header, key: header[key].update(shape=[1 << 47, 1 << 47])),
    "many dimensions": edit_header(lambda header, key: header[key].update(shape=[1] * 10_000 + [384])),
    "one offset": edit_header(lambda header, key: header[key].update(data_offsets=[0])),
    "offsets backwards": edit_header(lambda header, key: header[key]["data_offsets"].reverse()),
    "not a tensor": edit_header(lambda header, key: header.update({key: 7})),
    "a configuration that is no JSON": change_config(b"r: 8"),
    "a configuration that is a list": change_config(b"[]"),
    "more dropout than there is": lambda folder: edit_config(folder, lora_dropout=2.0),
    "a configuration without end": change_config(b" " * ((1 << 20) + 1)),
    "a configuration that names a key twice": change_config(b'{"r": 8, "r": 4}'),
    "no type": lambda folder: change_config(b'{"r": 8, "target_modules": ["q_proj"]}')(folder),
    "a rank of zero": lambda folder: edit_config(folder, r=0),
    "a rank that is text": lambda folder: edit_config(folder, r="8"),
    "a rank that is true": lambda folder: edit_config(folder, r=True),
    "no alpha": lambda folder: edit_config(folder, lora_alpha=None),
    "an alpha that isn't finite": lambda folder: edit_config(folder, lora_alpha=float("inf")),
    "an alpha that is no float": lambda folder: edit_config(folder, lora_alpha=10**400),
    "a rank pattern of text": lambda folder: edit_config(folder, rank_pattern={"q_proj": "8"}),
    "a rank pattern that is a list": lambda folder: edit_config(folder, rank_pattern=["q_proj"]),
    "an invalid pattern": lambda folder: edit_config(folder, alpha_pattern={"(": 8}),
    "modules that are numbers": lambda folder: edit_config(folder, target_modules=[1, 2]),
    "no modules": lambda folder: edit_config(folder, target_modules=None),
    "more modules than any model has": lambda folder: edit_config(folder, target_modules=["a"] * 9000),
    "more patterns than any model has modules": lambda folder: edit_config(
        folder, rank_pattern={f"layer{number}": 4 for number in range(3000)}
    ),
    "more lists of layers than any model has": lambda folder: edit_config(
        folder, layers_to_transform=[0], layers_pattern=[f"layers{number}" for number in range(100)]
    ),
    "layers that are text": lambda folder: edit_config(folder, layers_to_transform=["0"]),
    "layers of a pattern": lambda folder: edit_config(folder, target_modules=".*q_proj", layers_to_transform=[0]),
    "lists of layers without layers": lambda folder: edit_config(folder, layers_pattern=["layers"]),
    "a task that PEFT doesn't know": lambda folder: edit_config(folder, task_type="CAUSAL"),
    "a task that is a list": lambda folder: edit_config(folder, task_type=["CAUSAL_LM"]),
}


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(shared, adapter, spoil):
    spoil(adapter)
    with pytest.raises(errors.AdapterFileError, match=r"(?s)eight.*: expected .*\. [A-Z]") as caught:
        shared.register("eight", adapter)
    assert len(str(caught.value)) < 700
    assert "eight" not in shared


UNSUPPORTED = {
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "a bias of lora_B": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "trainable tokens": {"trainable_token_indices": [1]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
    "layer replication": {"layer_replication": [[0, 2]]},
    "QALoRA": {"use_qalora": True},
    "Arrow": {"arrow_config": {"top_k": 2}},
    "an option that may be on when it is empty": {"megatron_config": {}},
    "another tuner": {"peft_type": "IA3"},
    "an initialisation that changes the base model": {"init_lora_weights": "pissa"},
    "an unknown initialisation": {"init_lora_weights": 1},
    "an unknown key": {"use_something_new": True},
    "an unknown key with a number": {"something_new": 0.5},
    "a rule for all layers": {"target_modules": "all-linear"},
    "a group that PEFT has as well": {"layers_to_transform": [0], "layers_pattern": ["(?P<idx>layers)"]},
    "names of lists of layers that are patterns": {"layers_to_transform": [0], "layers_pattern": ["(layers|h)*"]},
}


@pytest.mark.parametrize("values", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_a_store_does_not_take(shared, adapter, values):
    edit_config(adapter, **values)
    with pytest.raises(errors.AdapterUnsupportedError, match=r"eight.*: expected .*load_adapter"):
        shared.register("eight", adapter)


def test_keys_nobody_knows_that_are_off(shared, adapter):
    edit_config(adapter, use_something_new=False, something_newer=None, others=[], more={}, modules_to_save=[])
    shared.register("off", adapter)
    shared.unregister("off")


def rename(old, new):
    return lambda folder: edit_tensors(
        folder, lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}
    )


def cut(pattern, slices):
    return lambda folder: edit_tensors(
        folder,
        lambda tensors: {k: v[slices].contiguous() if pattern in k else v for k, v in tensors.items()},
    )


def without(pattern):
    return lambda folder: edit_tensors(folder, lambda all: {k: v for k, v in all.items() if pattern not in k})


MISMATCHED = {
    "a missing lora_A": without("layers.1.mlp.up_proj.lora_A"),
    "a missing lora_B": without("layers.1.mlp.up_proj.lora_B"),
    "a missing module": without("layers.1.mlp.up_proj"),
    "no tensors": without(""),
    "a module that the model lacks": rename("layers.1", "layers.7"),
    "a name that isn't printable": rename("layers.1.mlp.up_proj.lora_A", "\x1b[31m" * 20000 + ".lora_A"),
    "weights that PEFT would leave out": lambda folder: edit_config(folder, target_modules=["q_proj"]),
    "weights of layers that PEFT would leave out": lambda folder: edit_config(folder, layers_to_transform=[0]),
    "another number of inputs": cut("q_proj.lora_A", (slice(None), slice(40))),
    "another number of outputs": cut("q_proj.lora_B", (slice(40),)),
    "ranks that differ": cut("q_proj.lora_A", (slice(4),)),
    "not a matrix": lambda folder: edit_tensors(
        folder, lambda all: {k: v.flatten() if "q_proj.lora_A" in k else v for k, v in all.items()}
    ),
    "another rank than the configuration's": lambda folder: edit_config(folder, r=4),
    "another rank than the pattern's": lambda folder: edit_config(folder, rank_pattern={"q_proj": 4}),
    "a scaling that is no number in float32": lambda folder: edit_config(folder, lora_alpha=1e300),
}


@pytest.mark.parametrize("spoil", MISMATCHED.values(), ids=MISMATCHED)
def test_files_that_do_not_fit(shared, adapter, spoil):
    spoil(adapter)
    with pytest.raises(errors.AdapterMismatchError, match=r"eight.*: expected ") as caught:
        shared.register("eight", adapter)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_a_rank_larger_than_any_may_be(shared, tmp_path):
    folder = save(tmp_path / "nine", LoraConfig(r=9, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(errors.AdapterMismatchError, match=r"has rank 9 in .*: expected 8 at most\. Pass a larger"):
        shared.register("nine", folder)


EXTRA = {
    "a magnitude of DoRA": "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    "a bias": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
    "an embedding": "base_model.model.model.embed_tokens.weight",
    "LoRA of an embedding": "base_model.model.model.embed_tokens.lora_embedding_A",
    "the name of an adapter": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
}


@pytest.mark.parametrize("key", EXTRA.values(), ids=EXTRA)
def test_tensors_beside_plain_lora(shared, adapter, key):
    edit_tensors(adapter, lambda tensors: tensors | {key: torch.zeros(48, 48)})
    with pytest.raises(errors.AdapterUnsupportedError, match=r"has the tensor .*: expected .*Use load_adapter"):
        shared.register("eight", adapter)


def test_adapters_on_layers_that_are_not_linear(shared, tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    with pytest.raises(errors.AdapterUnsupportedError, match=r"lora_embedding.*Use load_adapter"):
        shared.register("embedding", save(tmp_path, config))


def test_headers_that_only_safetensors_writes_differently(shared, adapter):
    """Metadata, spaces after the header and another order of names are allowed."""
    header, data = header_of(adapter)
    text = json.dumps({"__metadata__": {"format": "pt", "who": "me"}, **dict(reversed(header.items()))}) + " " * 13
    write(adapter, text.encode(), data)
    shared.register("again", adapter)
    shared.unregister("again")


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_any_place(shared, saved, tmp_path, data):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / "eight", folder)
    file = folder / data.draw(st.sampled_from([CONFIG, WEIGHTS, WEIGHTS]))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, min(len(raw), 3000)))
        new = data.draw(
            st.one_of(st.binary(max_size=9), st.sampled_from([b"9" * 30, b'"', b"[", b"}", b"-1", b"null"]))
        )
        raw[start : start + data.draw(st.integers(0, 9))] = new
    file.write_bytes(raw)
    try:
        shared.register("fuzzed", folder)
    except errors.MultibatchError as error:
        assert len(str(error)) < 1000
    else:
        shared.unregister("fuzzed")


SIZES = st.one_of(st.integers(-2, 50), st.sampled_from([8, 48, 80, 1 << 40, 1 << 63, 10**30]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=5)),
    lambda each: st.one_of(st.lists(each, max_size=4), st.dictionaries(st.text(max_size=5), each, max_size=4)),
    max_leaves=8,
)


@st.composite
def headers(draw, known):
    """Draw plausible headers, with any part of them replaced."""
    found = dict(known)
    for key in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3, unique=True)):
        how = draw(st.sampled_from(["shape", "data_offsets", "dtype", "entry", "rename", "drop"]))
        entry = found.pop(key)
        if how in entry:
            if how == "dtype":
                value = draw(st.one_of(st.sampled_from(["F64", "F16", "BF16", "I8", "F8_E4M3", "f32"]), VALUES))
            else:
                value = draw(st.one_of(st.lists(SIZES, max_size=3), VALUES))
            found[key] = {**entry, how: value}
        elif how == "entry":
            found[key] = draw(VALUES)
        elif how == "rename":
            found[draw(st.text(max_size=300))] = entry
    return found


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_that_say_anything(shared, saved, tmp_path, data):
    """No header crashes the store, or makes it allocate more memory than files of its size could need."""
    folder = tmp_path / "said"
    if not folder.exists():
        shutil.copytree(saved / "eight", folder)
    header, weights = header_of(saved / "eight")
    header.pop("__metadata__", None)
    text = json.dumps(data.draw(headers(header))).encode()
    length = data.draw(
        st.one_of(st.just(len(text)), st.integers(0, len(text) + 9), st.sampled_from([1 << 40, 2**64 - 1]))
    )
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text + weights[: data.draw(st.integers(0, 99)) or None])
    tracemalloc.start()
    try:
        shared.register("said", folder)
    except errors.MultibatchError as error:
        assert len(str(error)) < 1000
    else:
        shared.unregister("said")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**22
    assert shared.stats().host_bytes == 0


@given(st.dictionaries(st.sampled_from([
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "use_rslora", "lora_dropout", "peft_type", "bias", "init_lora_weights", "other",
]), VALUES, min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_configurations_that_say_anything(shared, saved, tmp_path, values):
    folder = tmp_path / "said"
    if not folder.exists():
        shutil.copytree(saved / "eight", folder)
    shutil.copy(saved / "eight" / CONFIG, folder / CONFIG)
    edit_config(folder, **values)
    try:
        shared.register("said", folder)
    except errors.MultibatchError as error:
        assert len(str(error)) < 1000
    else:
        shared.unregister("said")


@pytest.mark.parametrize("text", [b'{"a%d": {}}', b'{"a%d": []}', b'"%d"', b"[%d]"], ids=str)
def test_the_largest_header_that_is_read(shared, adapter, text):
    """The header has as many, minimal entries as fit."""
    entry = text.strip(b"{}").replace(b": {", b": {}") if text.startswith(b"{") else text
    many = b",".join(entry % number for number in range((3 << 20) // len(entry)))
    write(adapter, (b"{" + many + b"}") if text.startswith(b"{") else (b"[" + many + b"]"), b"")
    tracemalloc.start()
    with pytest.raises(errors.AdapterFileError):
        shared.register("eight", adapter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * (adapter / WEIGHTS).stat().st_size


def test_layouts_of_adapters_that_are_gone_go_as_well(rooted, saved):
    store, root = rooted
    folder = shutil.copytree(saved / "eight", root / "one")
    for number in range(300):
        edit_config(folder, lora_alpha=number)
        store.register("one", folder)
    assert len(store._layouts._by_content) <= layouts.KNOWN_FILES + 1


# Allowed locations of files.


NO_PATHS = {
    "a null character": "a\0b", "a number": 3, "None": None, "a list": ["a"], "a null byte": b"a\0b",
    "half of a surrogate pair": "a\ud800b",
}  # fmt: skip


@pytest.mark.parametrize("path", NO_PATHS.values(), ids=NO_PATHS)
def test_paths_that_are_none(shared, path):
    for register in (lambda: shared.register("eight", path), lambda: shared.register_folder(path)):
        with pytest.raises(errors.AdapterFileError, match=r"was named .*: expected a path"):
            register()
    with pytest.raises(errors.AdapterFileError, match=r"was named .*: expected a path"):
        peft_multibatch.enable(base_model()).adapter_store(roots=[path])


def test_roots(saved, tmp_path):
    """A single path is one root, not a list of letters, one of which may be "/"; an empty list doesn't allow every
    path."""
    store = peft_multibatch.enable(base_model()).adapter_store(roots=str(tmp_path))
    with pytest.raises(errors.AdapterFileError, match="outside of the store's roots"):
        store.register("eight", saved / "eight")
    with pytest.raises(errors.AdapterFileError, match=r"roots=\[\]: expected"):
        peft_multibatch.enable(base_model()).adapter_store(roots=[])
    store = peft_multibatch.enable(base_model()).adapter_store(roots=[str(saved).encode(), tmp_path])
    store.register("eight", str(saved / "eight").encode())


def test_a_folder_that_becomes_a_link_to_one_outside(rooted, saved):
    """After registration, either the registered files are read or nothing."""
    store, root = rooted
    shutil.copytree(saved / "eight", root / "eight")
    store.register("eight", root / "eight")
    os.rename(root / "eight", root / "before")
    (root / "eight").symlink_to(saved / "eight")
    with pytest.raises(errors.AdapterFileError, match="changed since they were registered"):
        store.adapters([store._names.ids["eight"]])
    with pytest.raises(errors.AdapterFileError, match="outside of the store's roots"):
        store.register("eight", root / "eight")


def test_a_folder_that_becomes_a_link_while_it_is_registered(rooted, saved, monkeypatch):
    store, root = rooted
    shutil.copytree(saved / "eight", root / "eight")
    check = paths._check_inside

    def swap(*args):
        check(*args)
        os.rename(root / "eight", root / "before")
        (root / "eight").symlink_to(saved / "eight")

    monkeypatch.setattr(paths, "_check_inside", swap)
    with pytest.raises(errors.AdapterFileError, match=r"eight.* that can be opened"):
        store.register("eight", root / "eight")
    assert "eight" not in store


def test_a_file_system_that_fails_while_adapters_are_registered(rooted, saved, monkeypatch):
    store, root = rooted
    for name in ("one", "two", "three"):
        shutil.copytree(saved / "eight", root / name)
    (root / "loop").symlink_to("loop")
    pread, reads = os.pread, []

    def fail(*args):
        reads.append(args)
        if len(reads) == 3:  # the first adapter takes two
            raise OSError(errno.EIO, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(os, "pread", fail)
    found = store.register_folder(root)
    assert found.names == ["one", "two"] and isinstance(found.refused["three"], errors.AdapterFileError)
    assert "can't be read (Input/output error): expected a file system that works" in str(found.refused["three"])


OPTIONS = {
    "max_rank": ["64", 0, None, 1.5, True], "slots": ["x", 0, -1], "timeout": [None, -1, "60", float("nan")],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in OPTIONS.items() for value in values])
def test_options_of_a_store_that_are_wrong(name, value):
    mb = peft_multibatch.enable(base_model())
    with pytest.raises(errors.UnsupportedError, match=rf"adapter_store got {name}=.*: expected .* or more"):
        mb.adapter_store(**{name: value})
    mb.adapter_store()


@pytest.fixture
def rooted(tmp_path):
    mb = peft_multibatch.enable(base_model())
    (tmp_path / "roots").mkdir()
    return mb.adapter_store(max_host_memory="10MB", roots=[tmp_path / "roots"]), tmp_path / "roots"


def test_folders_inside_of_the_roots(rooted, adapter):
    store, root = rooted
    shutil.copytree(adapter, root / "inside")
    store.register("inside", root / "inside")
    (root / "link").symlink_to(root / "inside")
    store.register("link", root / "link")
    assert set(store) == {"inside", "link"}


def link_folder(root, adapter):
    (root / "link").symlink_to(adapter)
    return root / "link"


def link_file(file):
    def link(root, adapter):
        shutil.copytree(adapter, root / "copy")
        (root / "copy" / file).unlink()
        (root / "copy" / file).symlink_to(adapter / file)
        return root / "copy"

    return link


OUTSIDE = {
    "elsewhere": lambda root, adapter: adapter,
    "by dots": lambda root, adapter: root / ".." / adapter.name,
    "a folder that is a link": link_folder,
    "weights that are a link": link_file(WEIGHTS),
    "a configuration that is a link": link_file(CONFIG),
    "a name that begins alike": lambda root, adapter: shutil.copytree(adapter, f"{root}-more"),
}


@pytest.mark.parametrize("place", OUTSIDE.values(), ids=OUTSIDE)
def test_files_outside_of_the_roots(rooted, adapter, place):
    store, root = rooted
    with pytest.raises(errors.AdapterFileError, match=r"outside of the store's roots: expected"):
        store.register("outside", place(root, adapter))


def test_a_link_that_leads_nowhere(shared, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(errors.AdapterFileError, match=r"no folder"):
        shared.register("link", tmp_path / "link")


def test_a_weights_file_that_is_a_link_inside(shared, adapter):
    """As in the Hub's cache."""
    os.rename(adapter / WEIGHTS, adapter / "blob")
    (adapter / WEIGHTS).symlink_to("blob")
    shared.register("linked", adapter)
    shared.unregister("linked")


# Folders with one subfolder per adapter.


def test_one_bad_adapter_in_a_folder_stops_no_other(rooted, saved):
    store, root = rooted
    shutil.copytree(saved, root, dirs_exist_ok=True)
    edit_config(root / "four", use_dora=True)
    (root / "no adapter").mkdir()
    (root / "file").write_text("")
    found = store.register_folder(root)
    assert found.names == ["eight", "three"]
    assert list(found.refused) == ["four"] and isinstance(found.refused["four"], errors.AdapterUnsupportedError)
    edit_config(root / "four", use_dora=False)
    before = {name: store.serial(store._names.ids[name]) for name in ("eight", "three")}
    assert store.register_folder(root).names == ["eight", "four", "three"]
    assert before == {name: store.serial(store._names.ids[name]) for name in ("eight", "three")}


def test_a_folder_that_is_none(rooted):
    store, root = rooted
    with pytest.raises(errors.AdapterFileError, match=r"can't be read"):
        store.register_folder(root / "nowhere")


@pytest.mark.parametrize("name", ["", "__base__", "a\nb", "x" * 257, 3, None, b"sql", "a\udc80"])
def test_names_that_batches_could_not_use(shared, saved, name):
    with pytest.raises(errors.AdapterIdsError, match=r"by the name .*: expected"):
        shared.register(name, saved / "eight")


def test_a_pattern_for_every_module_takes_no_time(rooted, saved):
    store, root = rooted
    shutil.copytree(saved / "eight", root / "one")
    edit_config(root / "one", rank_pattern={f"model.layers.{number}.self_attn.x_proj": 4 for number in range(2000)})
    begin = time.perf_counter()
    store.register("one", root / "one")
    assert time.perf_counter() - begin < 5


def test_ten_thousand_equal_headers_are_parsed_once(rooted, saved, monkeypatch):
    store, root = rooted
    shutil.copytree(saved / "eight", root / "one")
    parsed = []
    monkeypatch.setattr(
        layouts, "parse_header", lambda *args, own=layouts.parse_header: parsed.append(args) or own(*args)
    )
    for number in range(50):
        store.register(f"name {number}", root / "one")
    assert len(parsed) == 1


def test_configurations_that_differ_where_nothing_is_computed_share_a_layout(rooted, saved):
    store, root = rooted
    for name in ("one", "two"):
        shutil.copytree(saved / "eight", root / name)
        edit_config(root / name, base_model_name_or_path=name, revision=name)
        store.register(name, root / name)
    one, two = store._versions.values()
    assert one.layout is two.layout


def test_float_files_of_all_dtypes(shared, adapter):
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        tensors = {key: value.to(dtype) for key, value in load_file(adapter / WEIGHTS).items()}
        save_file(tensors, adapter / WEIGHTS)
        shared.register("dtypes", adapter)
    shared.unregister("dtypes")


def test_every_supported_setting_registers(shared, tmp_path):
    for name, config in lora_configs().items():
        shared.register(name, save(tmp_path / name, config))
        shared.unregister(name)
