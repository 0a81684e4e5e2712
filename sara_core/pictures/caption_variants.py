"""Several captions of one picture, to draw from when it is learned: lines, or tags in other orders."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .captions import holds


@dataclass(frozen=True)
class VariantRule:
    """Which captions are made of what a picture has.

    Args:
        lines: Take each line for a caption of its own, instead of all of them for one.
        shuffle: Put tags, separated by commas, in another order.
        keep: Number of tags at the beginning that stay where they are and are never left out.
        dropout: Chance of each of the others to be left out, in `[0, 1]`.
        trigger: Tags that hold this word come first, before those that are kept are counted.
        count: Number of captions that are made where tags are shuffled or left out.
        seed: Of what is drawn.

    Raises:
        ValueError: A value out of range.
    """

    lines: bool = False
    shuffle: bool = False
    keep: int = 1
    dropout: float = 0.0
    trigger: str = ""
    count: int = 8
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.dropout <= 1 or self.keep < 0 or self.count < 1:
            raise ValueError(
                f"dropout is {self.dropout}, keep {self.keep} and count {self.count}; expected 0 to 1, at "
                "least 0 and at least 1"
            )

    def __call__(self, lines: Sequence[str]) -> tuple[str, list[str]]:
        """Make captions of the lines that a picture has.

        What is drawn depends on the lines and the seed alone.

        Returns:
            The caption that the picture is measured with, and those to draw from when it is learned;
            none if there is only the one.
        """
        captions = list(lines) if self.lines and lines else [" ".join(lines)]
        first = captions[0]
        if self.shuffle or self.dropout:
            chance = random.Random(f"{self.seed} {captions}")
            rounds = range(max(self.count, len(captions)))
            captions = [self._drawn(captions[i % len(captions)], chance) for i in rounds]
        return first, [] if set(captions) == {first} else captions

    def _drawn(self, caption: str, chance: random.Random) -> str:
        tags = sorted(split_tags(caption), key=lambda tag: not holds(tag, self.trigger))
        kept, others = tags[: self.keep], tags[self.keep :]
        others = [tag for tag in others if chance.random() >= self.dropout]
        if self.shuffle:
            chance.shuffle(others)
        return ", ".join(kept + others)


def split_tags(caption: str) -> Iterator[str]:
    """Split a caption at its commas, but not within parentheses that close, as of `(red, blue:1.2)`."""
    opened: list[int] = []
    within: list[tuple[int, int]] = []
    for match in re.finditer(r"\\.|[()]", caption):
        if match[0] == "(":
            opened.append(match.start())
        elif match[0] == ")" and opened:
            within.append((opened.pop(), match.start()))
    begin = 0
    for comma in [*(match.start() for match in re.finditer(",", caption)), len(caption)]:
        if not any(first < comma < last for first, last in within):
            if tag := caption[begin:comma].strip():
                yield tag
            begin = comma + 1
