"""Errors for names that do not exist: they restate the call, guess what was meant, and list what there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model


def choose(kind: str, name: str, allowed: Iterable[str]) -> str:
    """`name` if it is one of `allowed`, else ValueError: "there is no <kind> <name>; did you mean ...? There are: ..."."""
    allowed = list(allowed)
    if name in allowed:
        return name
    near = get_close_matches(str(name), allowed, n=8, cutoff=0.3)
    there = f"There are: {', '.join(allowed)}" if len(allowed) <= 120 else f"There are {len(allowed)}, the nearest: {', '.join(near)}"
    raise ValueError(f"there is no {kind} {name!r}{_guess(name, allowed)} {there}")


def check_options(owner: str, make: Callable[..., Any], options: Mapping[str, Any], skip: Iterable[str] = ()) -> None:
    """ValueError unless `make(**options)` would accept every name and get all that it needs; `skip`: parameters that are not options."""
    parameters = {n: p for n, p in inspect.signature(make).parameters.items() if n not in set(skip)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"{owner}: options must be named in the signature, it takes **kwargs")
    has = f" It has: {', '.join(parameters) or 'no options'}"
    for name in options:
        if name not in parameters:
            raise ValueError(f"{owner} has no option {name!r}{_guess(name, list(parameters))}{has}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{owner} needs the option {name!r}.{has}")


def complete_options(owner: str, make: Callable[..., Any], options: Mapping[str, Any], skip: str) -> dict[str, Any]:
    """Options with the constructor's defaults filled in, checked against its type hints: 1, 1.0 and "1.0" are one weight."""
    check_options(owner, make, options, skip={skip})
    model = _model(owner, make, skip)
    for name, value in options.items():
        refuse_bool(f"{owner}, option {name!r}", model.model_fields[name].annotation, value)
    try:
        return model(**options).model_dump(mode="json")
    except ValidationError as error:
        raise ValueError(f"{owner}, {spell_out(error, 'option ')}") from error


def refuse_bool(what: str, hint: Any, *values: Any) -> None:
    """ValueError for true or false where the type hint has no bool: pydantic takes true for 1."""
    if bool not in (hint, *get_args(hint)) and (wrong := [value for value in values if isinstance(value, bool)]):
        raise ValueError(f"{what} cannot be true or false; got {wrong[0]}")


@cache
def _model(owner: str, make: Callable[..., Any], skip: str) -> type[BaseModel]:
    """The options of a constructor as a pydantic model, made once: a table asks for it hundreds of times."""
    hints = get_type_hints(make.__init__, include_extras=True)  # type: ignore[misc]
    parameters = inspect.signature(make).parameters.values()
    fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters if p.name != skip}
    return create_model(owner, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def spell_out(error: ValidationError, prefix: str = "") -> str:
    """Every fault that pydantic found, in our words where they are ours: "crop: input should be a valid integer; got 'wide'"."""

    def text(e: Any) -> str:
        if "error" in e.get("ctx", {}):
            return str(e["ctx"]["error"])
        place = ".".join(map(str, e["loc"]))
        return f"{prefix}{place!r}: {e['msg'].lower()}; got {e['input']!r}"

    return "; ".join(text(e) for e in error.errors())


def _guess(name: str, allowed: list[str]) -> str:
    # case and separators are the commonest slips, and difflib is blind to them
    plain = {a.lower().replace("-", "_"): a for a in reversed(allowed)}
    close = get_close_matches(str(name).lower().replace("-", "_"), plain, n=1, cutoff=0.5)
    return f"; did you mean {plain[close[0]]!r}?" if close else "."
