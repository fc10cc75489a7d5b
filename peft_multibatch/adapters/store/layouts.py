"""A cache of layouts, because most of ten thousand adapters share a few headers and configurations."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping
from weakref import WeakValueDictionary

import torch

from peft_multibatch.adapters.store.files import AdapterFiles, StoredTensor, parse_config, parse_header
from peft_multibatch.adapters.store.layout import Layers, Layout, StoreDtype
from peft_multibatch.adapters.store.settings import Settings, read_settings


KNOWN_FILES = 256
"""The number of (header, configuration) pairs whose layout is found without parsing them again."""


class Layouts:
    """Finds the layout of an adapter's files, and tracks which layouts were checked against the current model.

    Layouts that no adapter uses any more are freed, except for the last few.

    Args:
        model: the model's layers.
        max_rank: the largest allowed rank.
        dtype: the dtype of weights in memory.
    """

    def __init__(self, model: Layers, max_rank: int, dtype: StoreDtype) -> None:
        self._model, self._max_rank, self._dtype = model, max_rank, dtype
        self._by_content: MutableMapping[tuple[tuple[StoredTensor, ...], Settings], Layout] = WeakValueDictionary()
        self._by_bytes: OrderedDict[tuple[bytes, int, bytes], Layout] = OrderedDict()
        self._lock = threading.RLock()  # held while layers are prepared, which waits for running steps
        self._content_lock = threading.Lock()

    def find(self, name: str, found: AdapterFiles) -> Layout:
        """The layout of an adapter's files, checked against the model.

        Args:
            name: the adapter's name, for messages.
            found: its files.

        Raises:
            AdapterFileError: the files are damaged.
            AdapterUnsupportedError: it isn't plain LoRA on linear layers.
            AdapterMismatchError: it doesn't fit the model.
        """
        key = found.header, found.size, found.config
        with self._lock:
            layout = self._by_bytes.get(key)
            if layout is None:
                settings = read_settings(name, parse_config(name, found.config))
                tensors = parse_header(name, found.header, found.size)
                layout = self._by_content.get((tensors, settings))
                if layout is None:
                    changes = self._model.changes
                    layout = Layout(name, tensors, settings, self._model, self._max_rank, self._dtype)
                    with self._content_lock:
                        self._by_content[tensors, settings] = layout
                    layout.checked = changes
                self._by_bytes[key] = layout
                if len(self._by_bytes) > KNOWN_FILES:
                    self._by_bytes.popitem(last=False)
        self.check(name, layout)
        return layout

    def expect(
        self, modules: Iterable[str], can_run: Callable[[torch.dtype, int], bool]
    ) -> dict[torch.dtype | None, tuple[int, bool]]:
        """The dtypes of all adapters in these modules, with the largest rank of each, and whether all are aligned.

        Args:
            modules: the names of the modules.
            can_run: whether weights of a dtype and rank count.
        """
        found: dict[torch.dtype | None, tuple[int, bool]] = {}
        with self._content_lock:
            known = [layout.layers for layout in self._by_content.values()]
        for layer in [layers[name] for layers in known for name in modules if name in layers]:
            if not can_run(layer.dtype, layer.lora_a.shape[0]):
                continue
            rank, is_aligned = found.get(layer.dtype, (0, True))
            found[layer.dtype] = max(rank, layer.lora_a.shape[0]), is_aligned and layer.lora_a.shape[0] % 8 == 0
        return found

    def check(self, name: str, layout: Layout) -> None:
        """Check a layout against the model again, if its layers changed since the last check.

        Raises:
            AdapterUnsupportedError: a layer can't have stored adapters any more.
            AdapterMismatchError: the adapter doesn't fit the model any more.
        """
        changes = self._model.changes
        if layout.checked != changes:
            layout.check(name, self._model)
            layout.checked = changes
