"""Decode tokens to text, incrementally and up to a stop string."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Stop:
    """Finds a stop string in a growing text, in constant time per character (Knuth-Morris-Pratt).

    Args:
        string: the stop string.
    """

    def __init__(self, string: str) -> None:
        self.string, self.matched = string, 0  # length of the prefix that the text ends with
        self._shorter = [0]  # for each prefix, the length of the longest shorter prefix that it ends with
        for character in string[1:]:
            self._shorter.append(self._next(self._shorter[-1], character))

    def push(self, text: str) -> int | None:
        """Read more text; returns the position in it at which the string ends, or None."""
        for end, character in enumerate(text, start=1):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self.string):
                return end
        return None

    def _next(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.string[matched] == character)


class Text:
    """The text of one sequence.

    Args:
        tokenizer: the model's tokenizer.
        stops: stop strings, which aren't included in the text.

    Attributes:
        has_stops: whether there are stop strings.
        is_stopped: whether one was found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.is_stopped, self.has_stops = False, bool(stops)
        self._tokenizer, self._stops = tokenizer, [Stop(each) for each in stops]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""  # output of the stream so far
        self._shown = 0  # number of characters already sent to the client

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens and return new text, without an end that may be the start of a stop string."""
        self._ids += ids
        step, tokenizer = self._stream.step, self._tokenizer._tokenizer
        new = "".join([step(tokenizer, token) or "" for token in ids])
        self._decoded += new
        return self._show(new, held_back=True)

    def finish(self) -> str:
        """Return the remaining text after the last token."""
        new = ""
        if not self.is_stopped:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if whole.startswith(self._decoded):  # includes an incomplete last character
                self._decoded, new = whole, whole[len(self._decoded) :]
        return self._show(new, held_back=False)

    def _show(self, new: str, held_back: bool) -> str:
        if self.is_stopped:
            return ""
        end, before = len(self._decoded), len(self._decoded) - len(new)
        found = [before + at - len(stop.string) for stop in self._stops if (at := stop.push(new)) is not None]
        if found:
            self.is_stopped, end = True, min(found)
        elif held_back:
            end -= max((stop.matched for stop in self._stops), default=0)
        shown, self._shown = self._decoded[self._shown : end], max(self._shown, end)
        return shown


@functools.lru_cache(maxsize=1 << 18)  # up to twenty per generated token with log-probabilities
def token_text(tokenizer: Any, token: int) -> tuple[str, list[int]]:
    """Decode a single token to its text and its bytes."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text, list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece.startswith("<0x") and len(piece) == 6:
        return text, [int(piece[3:5], 16)]
    known = [BYTES.get(character) for character in piece]
    return text, [each for each in known if each is not None] if None not in known else list(text.encode())


def _byte_characters() -> dict[str, int]:
    """Map the characters that byte-level tokenizers use to bytes: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [each for each in range(256) if each not in plain]
    return {chr(each): each for each in plain} | {chr(256 + index): each for index, each in enumerate(others)}


BYTES = _byte_characters()
