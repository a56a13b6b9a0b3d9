"""Commands that take dataclasses of options: typer sees each field as an option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

from ngeval.cli.options import OPTIONS


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread the dataclasses among a command's parameters into one parameter for each field.

    The flags and the help of the fields are those of `ngeval.cli.options.OPTIONS`.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _field_parameters(groups[name])
        else:
            parameters.append(_parameter(name, parameter.default, hints[name]))

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    # typer reads the signature and the annotations; the wrapped command must not shadow them.
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del spread.__wrapped__
    return spread


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints, options = get_type_hints(group), OPTIONS[group]
    return [
        _parameter(field.name, field.default, Annotated[hints[field.name], options[field.name]])
        for field in fields(group)
    ]


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
