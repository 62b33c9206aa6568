"""What the fields of a configuration may hold: said in their types, checked when one is made.

    lr: Positive = 1.5e-3
    clip_grad: Positive | None = 3.0

    def __post_init__(self) -> None:
        check_fields(self)

A type is also what the command line's `--help` shows and what its errors say is allowed. NaN and
infinity are no value of any field, and true is no number.
"""

import dataclasses
import functools
import math
import numbers
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:([^/?#]*)@)?")
SECRET = (
    "has a user's name, a password or a query, in which a signature may be: pass it without; "
    "credentials come from the environment of the store's client"
)
LARGE = 2**31 - 1  # of counts and sizes: what fits 32 bits, as libraries store them


class FieldError(ValueError):
    """A value that its field cannot have. `problem` goes on where the field's name ends."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field, self.problem = field, problem


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `open` names the ends that are not among them."""

    low: float
    high: float = LARGE
    open: Literal["", "low", "high", "both"] = ""

    def holds(self, value: Any) -> bool:
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        return above and below and value < math.inf  # and no comparison holds for NaN

    def words(self, value: Any = None) -> str:
        """The range; of one that ends where libraries do, the end that `value` lies beyond."""
        low = f"{'above' if self.open in ('low', 'both') else 'at least'} {self.low}"
        high = f"{'below' if self.open in ('high', 'both') else 'at most'} {self.high}"
        if self.high == LARGE:
            return high if value is not None and value > LARGE else low
        return low if self.high == math.inf else f"{low} and {high}"

    def __repr__(self) -> str:  # as --help shows it
        return self.words()


@dataclass(frozen=True)
class Text:
    """Text without a NUL, which no path can have; `empty`: "" stands for nothing given."""

    empty: bool = False

    def holds(self, value: str) -> bool:
        return "\0" not in value and (self.empty or bool(value.strip()))

    def words(self) -> str:
        return "text without NUL" if self.empty else "text without NUL that is not empty"

    def __repr__(self) -> str:
        return "may be empty" if self.empty else "not empty"


@dataclass(frozen=True)
class Rising:
    """Of two numbers the first is not above the second."""

    def holds(self, value: tuple[float, float]) -> bool:
        return value[0] <= value[1]

    def __repr__(self) -> str:
        return "low <= high"


Count = Annotated[int, Range(1)]
Batch = Annotated[int, Range(1, 65536)]  # images at once; more would be read for minutes, and held
Natural = Annotated[int, Range(0)]
Threads = Annotated[int, Range(1, 1024)]
Seed = Annotated[int, Range(0, 2**63 - 1)]  # packed as a signed 64-bit integer
Positive = Annotated[float, Range(0, math.inf, "low")]
# Of a time-out. At most thirty days: timers of Python and torch overflow at centuries, and then
# nobody watches.
Seconds = Annotated[float, Range(0, 2_592_000, "low")]
NonNegative = Annotated[float, Range(0, math.inf)]
Share = Annotated[float, Range(0, 1, "low")]  # of a whole that must leave something
Probability = Annotated[float, Range(0, 1)]
CropShare = Annotated[float, Range(0.05, 1)]  # of a resized side: what it is divided by
Fraction = Annotated[float, Range(0, 1, "high")]  # of a whole that must not take all
Part = Annotated[float, Range(0, 1, "both")]  # neither nothing nor all
Filled = Annotated[str, Text()]
Given = Annotated[str, Text(empty=True)]
Side = Count | tuple[Count, Count]  # pixels; (height, width) unless square
ShareRange = Annotated[tuple[Share, Share], Rising()]
PositiveRange = Annotated[tuple[Positive, Positive], Rising()]


def check_fields(config: Any) -> None:
    """Raise FieldError, that says what came and what is allowed, for a value outside its type."""
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, str) and has_secret(value):  # not shown, so that no log has it
            raise FieldError(name, f"is a URL that {SECRET}")
        if not fits(value, hint):
            came = repr(value)
            came = came if len(came) <= 80 else f"{came[:77]}..."
            raise FieldError(name, f"is {came}: give {allowed(hint, value)}")


def has_secret(text: str) -> bool:
    """Whether it is a URL with what may be one in it. A container before the host is none."""
    match = _URL.match(text)
    if match is None:
        return False
    scheme = match[1].lower()
    is_container = scheme in ("abfs", "abfss") and ":" not in match[2]
    # Of a web server "?" begins a query; of a store it may be a letter of a pattern.
    _, mark, rest = text.partition("?")
    has_query = bool(mark) if scheme in ("http", "https") else "=" in rest
    return (bool(match[2]) and not is_container) or has_query


@functools.cache
def hints(config_type: type) -> dict[str, Any]:
    """Types of the fields, by name."""
    found = get_type_hints(config_type, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(config_type)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a type with its ranges has this value."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0]) and all(check.holds(value) for check in arguments[1:])
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if arguments[-1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return value is None if hint is type(None) else isinstance(value, hint)


def allowed(hint: Any, value: Any = None) -> str:
    """What a type has, in words; of a range that a number breaks, the broken end."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, check = arguments[0], arguments[-1]
        if isinstance(check, Range):
            number = "a whole number" if kind is int else "a finite number"
            return f"{number}, {check.words(value if fits(value, kind) else None)}"
        return check.words() if isinstance(check, Text) else f"{allowed(kind)}, {check}"
    if origin in (Union, types.UnionType):
        return ", or ".join(allowed(option, value) for option in arguments)
    if origin is Literal:
        *first, last = (str(option) if option != "" else "''" for option in arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list [a, b, ...], each {allowed(arguments[0])}"
        return f"[{', '.join('abcd'[: len(arguments)])}], each {allowed(arguments[0])}"
    names = {type(None): "null", bool: "true or false", str: "text"}
    return names.get(hint, f"its fields ({hint.__name__})" if isinstance(hint, type) else str(hint))


def leaves(hint: Any) -> Iterator[Any]:
    """The types that a value of `hint` may be made of, with their ranges."""
    origin, arguments = get_origin(hint), get_args(hint)
    if (origin is Annotated and get_origin(arguments[0]) is None) or origin in (None, Literal):
        yield hint
    else:
        for argument in arguments[:1] if origin is Annotated else arguments:
            if argument is not Ellipsis:
                yield from leaves(argument)
