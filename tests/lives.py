"""A model whose adapters are added, changed and removed in random order, for ``model/test_stateful.py``."""

from __future__ import annotations

import copy

from changes import CHANGES, KINDS, add, layers_of, saved
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter


NAMES = ["amber", "blue", "coral", "denim", "ebony", "fawn"]  # hotswap_adapter looks for names anywhere in the keys
NO_MIXTURE = ("dora", "head")  # refused by mixtures and by hotswap_adapter


# Choices for the rules, according to the model's current state.


def sound_names(machine):
    return [name for name in sorted(machine.ids) if name not in machine.faults]


def can_lose_one(machine):
    return len(sound_names(machine)) > 1


def has_room(machine):
    return len(machine.ids) < len(NAMES)


def chosen(choices):
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


sound = chosen(sound_names)
free = chosen(lambda machine: [name for name in NAMES if name not in machine.ids])
kinds, seeds, nth = st.sampled_from(sorted(KINDS)), st.integers(0, 3), st.integers(0, 13)
change_names, factors = st.sampled_from(sorted(CHANGES)), st.sampled_from([0.5, -1.0, 2.0])


class Life(RuleBasedStateMachine):
    """A model, and its expected state.

    Attributes:
        ids: names of the adapters and their integer ids: the n-th name that was ever added has id n.
        ever: the same for all names so far.
        kinds: the kind of each adapter.
        faults: reasons of those that can't run.
        resized: adapters with a layer whose rank differs from their configuration.
        hooks: functions that remove them.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.model = self.mb = None
        self.ids, self.ever, self.kinds, self.faults, self.resized, self.hooks = {}, {}, {}, {}, set(), []

    def describe(self):
        adapters = [f"{self.ids[name]} {name}: {self.faults.get(name, kind)}" for name, kind in self.kinds.items()]
        return f"[{', '.join(adapters)}; {self.model.active_adapter} active{'' if self.mb else '; disabled'}]"

    # Adding and removing adapters.

    def came(self, name, kind):
        self.kinds[name], self.ids[name] = kind, self.ever.setdefault(name, len(self.ever))

    def went(self, name):
        self.ids.pop(name)
        self.faults.pop(name, None)
        self.resized.discard(name)
        return self.kinds.pop(name)

    def remove(self, name):
        self.model.delete_adapter(name)
        kind = self.went(name)
        if self.model.active_adapter == name:  # PEFT keeps it if the first layer has no other adapter
            self.model.set_adapter(sound_names(self)[0])
        return kind

    @precondition(has_room)
    @rule(name=free, kind=kinds, seed=seeds)
    def add(self, name, kind, seed):
        add(self.model, name, kind, seed)
        self.came(name, kind)

    @precondition(has_room)
    @rule(name=free, kind=kinds, seed=seeds)
    def load(self, name, kind, seed):
        self.model.load_adapter(saved(kind, seed, self.folder), adapter_name=name)
        self.came(name, kind)

    @precondition(lambda self: can_lose_one(self) or self.faults)
    @rule(name=chosen(lambda machine: sorted(machine.ids if can_lose_one(machine) else machine.faults)))
    def delete(self, name):
        self.remove(name)

    @precondition(can_lose_one)
    @rule(name=sound, seed=seeds)
    def delete_and_add_again(self, name, seed):
        kind = self.remove(name)
        add(self.model, name, kind, seed)
        self.came(name, kind)

    @precondition(lambda self: has_room(self) and can_lose_one(self))
    @rule(old=sound, new=free, moves=st.booleans())
    def rename(self, old, new, moves):
        """Rename an adapter, through its state dict or in PEFT's own dictionaries."""
        is_resized, kind = old in self.resized, self.kinds[old]
        if (moves or is_resized) and kind != "head":
            self.model.set_adapter(next(name for name in sound_names(self) if name != old))
            for layer in self.model.modules():
                if isinstance(layer, BaseTunerLayer):
                    for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
                        if old in (found := getattr(layer, attribute)):
                            found[new] = found.pop(old)
            self.model.peft_config[new] = self.model.peft_config.pop(old)
            self.went(old)
            self.resized |= {new} if is_resized else set()
        elif not is_resized:
            state = copy.deepcopy(get_peft_model_state_dict(self.model, adapter_name=old))
            add(self.model, new, self.remove(old), 0)
            set_peft_model_state_dict(self.model, state, adapter_name=new)
        else:
            return
        self.came(new, kind)

    # Changing weights.

    @rule(name=sound, seed=seeds, hot=st.booleans())
    def load_over(self, name, seed, hot):
        path, is_swapped = saved(self.kinds[name], seed, self.folder), hot and self.kinds[name] not in NO_MIXTURE
        if is_swapped and name not in self.resized:
            self.model.set_adapter(name)  # PEFT compares configurations with the active adapter's
            hotswap_adapter(self.model, path, adapter_name=name, torch_device="cpu")
        elif name not in self.resized:
            self.model.load_adapter(path, adapter_name=name)

    @rule(change=change_names, name=sound, nth=nth, factor=factors)
    def change(self, change, name, nth, factor):
        layers = layers_of(self.model, name)
        CHANGES[change](layers[nth % len(layers)], name, factor)
        self.resized |= {name} if change == "replace_modules" else set()

    @rule(name=sound, nth=nth, half=st.sampled_from(["lora_A", "lora_B"]))
    def hook(self, name, nth, half):
        layers = layers_of(self.model, name)
        module = getattr(layers[nth % len(layers)], half)[name]
        self.hooks.append(module.register_forward_hook(lambda module, args, output: 2 * output))

    @precondition(lambda self: self.hooks)
    @rule()
    def unhook(self):
        self.hooks.pop().remove()

    @rule(name=sound)
    def select(self, name):
        self.model.set_adapter(name)
