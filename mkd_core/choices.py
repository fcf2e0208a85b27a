"""Errors that restate what was asked for, guess what was meant, and list what there is."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator


def choose(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return `name` if it is allowed, else raise: there is no KIND NAME; did you mean ...? There are: ..."""
    allowed = list(allowed)
    if name in allowed:
        return name
    there = f"There are: {', '.join(allowed)}"
    if len(allowed) > 120:
        near = get_close_matches(str(name), allowed, n=8, cutoff=0.3)
        there = f"There are {len(allowed)}, the nearest: {', '.join(near)}"
    raise ValueError(f"there is no {kind} {name!r}{_guess(name, allowed)} {there}")


class Checked(BaseModel):
    """A frozen model that takes no unknown keys and tells all its faults in one ValueError."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, **keys: Any):
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise ValueError("; ".join(_spell_out(e, type(self)) for e in error.errors())) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        hint = cls.model_fields[str(info.field_name)].annotation
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool) for v in values) and bool not in (hint, *get_args(hint)):
            raise ValueError(f"{info.field_name!r} cannot be true or false; got {value}")
        return value


def complete_options(
    owner: str, make: Callable, options: Mapping[str, Any], changed: bool = False
) -> dict[str, Any]:
    """Fill in the constructor's defaults and check options, all its parameters but the first, against its type hints.

    owner: its name in errors; changed: leave out what is at its default.
    The number 1.0 may be written 1 or "1.0": equal runs have equal ids.
    """
    return _model(owner, make)(**options).model_dump(mode="json", exclude_defaults=changed)


@cache
def _model(owner: str, make: Callable[..., Any]) -> type[Checked]:
    """Make the options of a constructor a pydantic model, once: a table asks hundreds of times."""
    hints = get_type_hints(make.__init__, include_extras=True)  # type: ignore[misc]
    fields: dict[str, Any] = {}
    for name, parameter in [*inspect.signature(make).parameters.items()][1:]:
        if name not in hints:
            raise ValueError(f"{owner}: option {name!r} needs a type, as those in methods/base.py")
        fields[name] = hints[name], ... if parameter.default is parameter.empty else parameter.default
    return create_model(owner, __base__=Checked, **fields)


def _spell_out(error: Any, model: type[BaseModel]) -> str:
    """Tell a fault that pydantic found in our words: "mkd, 'decay': input should be ...; got 2"."""
    place, fields = ".".join(map(str, error["loc"])), list(model.model_fields)
    has = f"It has: {', '.join(fields) or 'no options'}"
    if error["type"] == "extra_forbidden":
        return f"{model.__name__} has no option {place!r}{_guess(place, fields)} {has}"
    if error["type"] == "missing":
        return f"{model.__name__} needs the option {place!r}. {has}"
    if "error" in error.get("ctx", {}):  # one of ours
        return str(error["ctx"]["error"])
    quotes = "; in YAML, text that reads as a number, a date or null needs quotes"
    hint = {"string_type": quotes, "tuple_type": "; several values are a list: [32, 32]"}
    said = f"{model.__name__}, {place!r}: {error['msg'].lower()}; got {error['input']!r}"
    return said + hint.get(error["type"], "")


def _guess(name: str, allowed: list[str]) -> str:
    # case and separators are the commonest slips, and difflib is blind to them
    plain = {a.lower().replace("-", "_"): a for a in reversed(allowed)}
    close = get_close_matches(str(name).lower().replace("-", "_"), plain, n=1, cutoff=0.5)
    return f"; did you mean {plain[close[0]]!r}?" if close else "."
