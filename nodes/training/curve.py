"""The curves that the chart of SaRA Train draws, as plain numbers; the drawing is in js/sara_train.js."""

from collections.abc import Sequence

MAX_POINTS = 400  # about; up to twice as many on the way


class Curve:
    """A curve of any length in few points: means over as many values each."""

    def __init__(self, values: Sequence[float] = ()):
        self._means: list[float] = []
        self._sum, self._count, self._stride, self.length = 0.0, 0, 1, 0
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        """Append a value; a value that is not finite is shown as the one before."""
        if value - value != 0:
            value = self._means[-1] if self._means else 0.0
        self.length += 1
        self._sum += value
        self._count += 1
        if self._count == self._stride:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * MAX_POINTS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2

    def points(self) -> list[list[float]]:
        """Return number and mean of each stretch of values; the number is that of its last one."""
        points = [[(i + 1) * self._stride, mean] for i, mean in enumerate(self._means)]
        if self._count:
            points.append([self.length, self._sum / self._count])
        return points
