"""Factors of the learning rate, by patterns of parameter names."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

Rates = str | Mapping[str, float]


def rates_of(names: Iterable[str], rates: Rates | None) -> dict[str, float]:
    """Return the factor of each parameter that has one other than 1.

    Args:
        names: Of the parameters that train.
        rates: Factor above 0 by wildcard pattern (`*`, `?`, `[...]`): it is that of names in which the pattern
            occurs; of several, the last one counts. As text: `attn2=1, *ff*=0.5`, separated by commas or line
            breaks.

    Raises:
        ValueError: Something else, or a pattern that occurs in no name.
    """
    names = list(names)
    found: dict[str, float] = {}
    for pattern, factor in _pairs(rates or {}):
        matches = [name for name in names if fnmatchcase(name, f"*{pattern}*")]
        if not matches:
            raise ValueError(
                f"the rate of {pattern!r} is that of no parameter that trains; names look like "
                f"{', '.join(names[:3])}"
            )
        found |= dict.fromkeys(matches, factor)
    return {name: factor for name, factor in found.items() if factor != 1}


def refuse_bad_rates(rates: Rates | None) -> None:
    """Raise if rates are not written as `rates_of` reads them.

    Raises:
        ValueError: They are not.
    """
    _pairs(rates or {})


def _pairs(rates: Rates) -> list[tuple[str, float]]:
    if isinstance(rates, str):
        parts = [part.strip() for part in rates.replace("\n", ",").split(",")]
        given = [_halves(part.replace("=", ":")) for part in parts if part]
    else:
        given = [(pattern, str(factor)) for pattern, factor in rates.items()]
    pairs = []
    for pattern, text in given:
        try:
            factor = float(text)
        except (TypeError, ValueError):
            factor = 0.0
        if not pattern.strip() or not 0 < factor < float("inf"):
            raise ValueError(
                f"the rate of {pattern.strip()!r} is {text!r}; expected a pattern of names and a factor above "
                "0, such as attn=1, mlp=0.5. To leave layers out, exclude them"
            )
        pairs.append((pattern.strip(), factor))
    return pairs


def _halves(text: str) -> tuple[str, str]:
    """Return pattern and factor; one without a colon is a pattern without a factor."""
    pattern, colon, factor = text.rpartition(":")
    return (pattern, factor) if colon else (text, "")
