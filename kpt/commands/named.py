"""What a user names on a command line or in a file as MODULE:FUNCTION."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from typing import Annotated, Any

import typer

from kpt.errors import ConfigError, KptError

ArgsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Called without arguments, returns the tuple (or list) of the program's arguments, or the only one itself (an array, a dict). "
        "Not needed where the program is named by a function without parameters that returns (function or model, tuple of its arguments).",
    ),
]

_NAMED = 10
"""Functions of a module that a message names; of more, those with a name like the one asked for."""


def attribute(reference: str) -> Any:
    """What "module:name" or "module:name.attribute" names."""
    module, _, path = reference.partition(":")
    if not module or not path:
        raise ConfigError(
            f"{reference!r} was given", "It is not of the form MODULE:FUNCTION", "Write it like train:loss"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is missing inside the user's own is another matter, and is reported as it is.
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise KptError(
            f"{reference!r} was given", f"There is no module {error.name!r} in {os.getcwd()} or on the path",
            f"Modules are named without .py: {module[:-3].replace('/', '.')}:{path}" if module.endswith(".py")
            else "Run kpt where the module is, or install it",
        ) from None  # fmt: skip
    for name in path.split("."):
        if not hasattr(found, name):
            public = [n for n in vars(found) if not n.startswith("_") and callable(getattr(found, n))]
            near = difflib.get_close_matches(name, public, n=3)
            has = f"; it has {', '.join(public) or 'no functions'}" if len(public) <= _NAMED else ""
            raise KptError(
                f"{reference!r} was given",
                f"{module} has no {path!r}{has}",
                f"It may be {' or '.join(near)}" if near else "Correct the name",
            )
        found = getattr(found, name)
    return found


def call(function: str, args_from: str | None, what: str) -> tuple[Any, tuple[Any, ...]]:
    """A function or model by name, and its arguments from the function that returns them as a tuple or list, or the only one.

    Without such a function, what is named may be a factory: it takes nothing, and returns `(function or model, its arguments)`.

    Raises:
      KptError: there is no such name, it is a class or no program at all, or the function does not take these arguments.
    """
    target = attribute(function)
    if not _is_program(target) and not inspect.isclass(target):
        raise KptError(f"{what} of {function} was asked for", f"It is of type {type(target).__name__}", "Name a function or a model")
    if inspect.isclass(target):
        raise KptError(f"{what} of {function} was asked for", "It is a class, of which there may be many models",
                       f"Name a model, or a function that returns one and its inputs: return {target.__name__}(...), inputs")  # fmt: skip
    if args_from is not None:
        arguments = _tuple(_made_by(args_from))
        return target, _taken(target, arguments, f"{what} of {function} was asked for, with what {args_from} returned")
    if required := _required_parameters(target):
        raise KptError(
            f"{what} of {function} was asked for",
            f"It takes {', '.join(required)}, and what it does depends on their shapes and dtypes",
            "Name a function that returns them as a tuple (--args-from MODULE:FUNCTION), or one that returns (function or model, inputs)",
        )
    if not inspect.isfunction(target):
        return target, ()
    made = target()
    if not (isinstance(made, tuple) and len(made) == 2 and _is_program(made[0])):
        return target, ()  # a program without arguments
    return made[0], _taken(made[0], _tuple(made[1]), f"{what} of what {function} returned was asked for")


def _made_by(args_from: str) -> Any:
    made, asked, advice = attribute(args_from), f"Arguments from {args_from} were asked for", "Name a function without parameters"
    if not callable(made):
        raise KptError(asked, f"It is of type {type(made).__name__}, and is not called", f"{advice} that returns it")
    if required := _required_parameters(made):
        raise KptError(asked, f"It is called without arguments, and takes {', '.join(required)}", f"{advice}, or give these defaults")
    return made()


def _tuple(arguments: Any) -> tuple[Any, ...]:
    return tuple(arguments) if isinstance(arguments, tuple | list) else (arguments,)


def _is_program(made: Any) -> bool:
    """Whether it is a function or a model; a linen module is not callable outside of `apply`."""
    return not inspect.isclass(made) and (callable(made) or callable(getattr(made, "apply", None)))


def _taken(program: Any, arguments: tuple[Any, ...], asked: str) -> tuple[Any, ...]:
    if (problem := _does_not_take(program, arguments)) is not None:
        raise KptError(asked, f"That is {len(arguments)} positional argument{'' if len(arguments) == 1 else 's'}: {problem}",
                       "Return all of them as one tuple, in the order of the function's parameters")  # fmt: skip
    return arguments


def _does_not_take(function: Any, arguments: tuple[Any, ...]) -> str | None:
    """Why the function cannot be called with these arguments, as far as their number tells; None if it can."""
    if hasattr(function, "init") and hasattr(function, "apply"):  # a linen module, whose variables come first
        function = function.apply
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return str(error)
    return None


def _required_parameters(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
