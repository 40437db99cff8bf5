"""Bounds of a recipe's numbers: declared with the fields, as `Annotated[float, Meta(ge=0, le=1)]`, and read from there
by the checks of recipes and by the command line.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import msgspec

from edgemix.numbers import is_finite, shown
from edgemix.recipe.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msgspec import Meta

    from edgemix.recipe.problems import Where

Seed = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


def without_bounds(kind: Any) -> Any:
    """Return a field's type without its bounds."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


@cache
def bounds_of(part: type[msgspec.Struct], field: str) -> tuple[Any, Any]:
    """Return the type and the bounds of a number among a struct's fields; those of any other field are None."""
    kind = next(found.type for found in msgspec.structs.fields(part) if found.name == field)
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        if get_origin(option) is Annotated:
            number, bounds = get_args(option)
            return number, bounds
    return None, None


def bound_problems(value: Any, where: Where = ()) -> Iterator[Problem]:
    """Yield the numbers that are out of bounds in a struct, and in the structs, tuples and mappings that it holds."""
    if isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            found, place = getattr(value, field), (*where, field)
            _, bounds = bounds_of(type(value), field)
            if bounds is None:
                yield from bound_problems(found, place)
            elif isinstance(found, int | float) and not _allows(bounds, found):
                yield Problem(place, f"is {shown(found)}; it may be {_range(bounds)}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from bound_problems(item, (*where, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from bound_problems(item, (*where, key))


def _allows(bounds: Meta, number: float) -> bool:
    return (
        is_finite(number)
        and (bounds.ge is None or number >= bounds.ge)
        and (bounds.gt is None or number > bounds.gt)
        and (bounds.le is None or number <= bounds.le)
        and (bounds.lt is None or number < bounds.lt)
    )


def _range(bounds: Meta) -> str:
    """Return the bounds in words. Those used are ge, ge and le, gt, gt and le, gt and lt."""
    if bounds.gt is None:
        return f"{bounds.ge} or more" if bounds.le is None else f"{bounds.ge} to {bounds.le}"
    if bounds.lt is not None:
        return f"a number between {bounds.gt} and {bounds.lt}"
    above = f"number above {bounds.gt}"
    return f"any {above}" if bounds.le is None else f"a {above}, up to {bounds.le}"
