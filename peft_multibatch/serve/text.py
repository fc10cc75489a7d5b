"""Tokens → text that clients may see: as it grows, up to a stop string, and each token by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """The text of one sequence.

    Args:
        tokenizer: of the model.
        stops: strings at which the text ends; none of them is part of it.

    Attributes:
        has_stops: whether there are any.
        is_stopped: whether one of them came.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.is_stopped, self.has_stops = False, bool(stops)
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""  # what the stream gave so far
        self._shown = 0  # characters of it that clients have

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens, and return what may be shown that wasn't: nothing that a stop string may begin with."""
        self._ids += ids
        step, tokenizer = self._stream.step, self._tokenizer._tokenizer
        new = "".join([step(tokenizer, token) or "" for token in ids])
        self._decoded += new
        if self._stops:
            return self._show(held_back=True)
        self._shown = len(self._decoded)
        return new

    def finish(self) -> str:
        """The rest, when no token comes any more."""
        if not self.is_stopped:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if whole.startswith(self._decoded):  # with a character that ends in the middle
                self._decoded = whole
        return self._show(held_back=False)

    def _show(self, held_back: bool) -> str:
        if self.is_stopped:
            return ""
        found = [at for stop in self._stops if (at := self._decoded.find(stop, self._shown)) >= 0]
        end = len(self._decoded)
        if found:
            self.is_stopped, end = True, min(found)
        elif held_back:
            end -= max((_overlap(self._decoded, stop) for stop in self._stops), default=0)
        shown, self._shown = self._decoded[self._shown : end], max(self._shown, end)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string begins."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int]]:
    """A token by itself, as text and as the bytes that it stands for."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text, list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece.startswith("<0x") and len(piece) == 6:
        return text, [int(piece[3:5], 16)]
    known = [BYTES.get(character) for character in piece]
    return text, [each for each in known if each is not None] if None not in known else list(text.encode())


def _byte_characters() -> dict[str, int]:
    """Bytes by the characters that byte-level tokenizers write for them: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [each for each in range(256) if each not in plain]
    return {chr(each): each for each in plain} | {chr(256 + index): each for index, each in enumerate(others)}


BYTES = _byte_characters()
