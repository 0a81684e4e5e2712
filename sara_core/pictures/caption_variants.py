"""Several captions of one picture, to draw from when it is learned: lines, or tags in other orders."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class VariantRule:
    """Which captions are made of what a picture has.

    Args:
        lines: Take each line for a caption of its own, instead of all of them for one.
        shuffle: Put tags, separated by commas, in another order.
        keep: Number of tags at the beginning that stay where they are and are never left out.
        dropout: Chance of each of the others to be left out, in `[0, 1]`.
        count: Number of captions that are made where tags are shuffled or left out.
        seed: Of what is drawn.

    Raises:
        ValueError: A value out of range.
    """

    lines: bool = False
    shuffle: bool = False
    keep: int = 1
    dropout: float = 0.0
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
        tags = list(split_tags(caption))
        kept, others = tags[: self.keep], tags[self.keep :]
        others = [tag for tag in others if chance.random() >= self.dropout]
        if self.shuffle:
            chance.shuffle(others)
        return ", ".join(kept + others)


def split_tags(caption: str) -> Iterator[str]:
    """Split a caption at its commas, but not within parentheses, as of `(red, blue:1.2)`."""
    depth, begin, place = 0, 0, 0
    while place <= len(caption):
        character = caption[place : place + 1]
        if not character or (character == "," and depth == 0):
            if tag := caption[begin:place].strip():
                yield tag
            begin = place + 1
        depth = max(0, depth + (character == "(") - (character == ")"))
        place += 2 if character == "\\" else 1
    if tag := caption[begin:].strip():
        yield tag
