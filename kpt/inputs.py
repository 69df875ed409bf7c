"""What is wrong with the example inputs of a program, said where it raised on them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kpt.errors import InputError, KptError
from kpt.raised import told

# A misspelt one of these lands among the program's keywords.
_OPTIONS = ("level", "hardware", "budget", "plan")
_ARRAYS = {"torch": ("torch", "Tensor"), "jax": ("jax", "Array"), "jaxlib": ("jax", "Array"), "numpy": ("numpy", "ndarray")}
_CONVERT = {"jax": "Pass arrays of JAX: jax.numpy.asarray(tensor.numpy())", "torch": "Pass tensors: torch.as_tensor(numpy.array(array))"}


@contextlib.contextmanager
def explained(
    program: Any, inputs: tuple, keywords: Mapping[str, Any], framework: str, call: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Around the first run of a program on its example inputs: an error that these explain becomes an InputError, any other stays.

    Args:
      call: what takes the inputs, by its signature, where that is not the program itself.

    Raises:
      InputError: the program does not take so many inputs or such a keyword, or it raised a TypeError or AttributeError that names the type
        of a tuple that is not unpacked, or of an array that is no tensor; from the original error, whose message it has. At once for
        tensors given to JAX.
    """
    given = ", ".join([*map(_kind, inputs), *(f"{k}={_kind(v)}" for k, v in keywords.items())])
    asked = f"{getattr(program, '__name__', type(program).__name__)} was to be planned for "
    asked += f"the example inputs ({given})" if given else "no example inputs"
    if framework == "jax" and any(_of(a) == _ARRAYS["torch"] for a in arrays_in((inputs, keywords))):
        raise InputError(asked, "To a JAX program a tensor of PyTorch is a constant, which it does not trace", _CONVERT["jax"])
    try:
        yield
    except KptError:
        raise
    except Exception as error:
        advice = _advice(_called(program) if call is None else call, inputs, keywords, framework, error)
        if advice is None:
            raise
        raise InputError(asked, f"It raised {told(error)}", advice) from error


def _advice(call: Callable[..., Any], inputs: tuple, keywords: Mapping[str, Any], framework: str, error: Exception) -> str | None:
    """What to do about the inputs; None where nothing is wrong with them that one could see."""
    misfit = not _takes(call, inputs, keywords) and not _began(call, error)
    said = str(error) if isinstance(error, TypeError | AttributeError) else ""
    (only,) = inputs if len(inputs) == 1 and not keywords else (None,)
    if misfit or type(only).__name__ in said:
        if isinstance(only, tuple | list) and only and _takes(call, tuple(only), {}):
            return "Unpack it: (function, *inputs) and not (function, inputs)"
        if isinstance(only, Mapping) and only and all(isinstance(k, str) for k in only) and _takes(call, (), only):
            return "Unpack it: (function, **inputs) and not (function, inputs)"
    if misfit:
        for name in keywords:
            if not _takes(call, inputs, {name: keywords[name]}) and (near := difflib.get_close_matches(name, _OPTIONS, 1)):
                return f"{name} may be {near[0]}, misspelt"
        return f"Pass the arguments of one typical call: {_signature(call)}"
    foreign = framework == "torch" and any(_of(a) != _ARRAYS["torch"] and type(a).__name__ in said for a in arrays_in((inputs, keywords)))
    return _CONVERT["torch"] if foreign else None


def _began(call: Callable[..., Any], error: Exception) -> bool:
    """Whether the program itself was under way, so that it was called with what it takes: a decorator may say other arguments."""
    inner: Any = call
    while isinstance(inner, functools.partial) or hasattr(inner, "__wrapped__"):
        inner = inner.func if isinstance(inner, functools.partial) else inner.__wrapped__
    code = getattr(inner if hasattr(inner, "__code__") else type(inner).__call__, "__code__", None)
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def _takes(call: Callable[..., Any], inputs: tuple, keywords: Mapping[str, Any]) -> bool:
    """Whether it can be called so, as far as number and names tell."""
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*inputs, **keywords)
    except TypeError:
        return False
    return True


def _signature(call: Callable[..., Any]) -> str:
    return ", ".join(map(_shown, inspect.signature(call).parameters.values())) or "it takes none"


def _shown(p: inspect.Parameter) -> str:
    """A default may be all parameters of a model."""
    if p.default is p.empty or isinstance(p.default, int | float | str | None):
        return str(p.replace(annotation=p.empty))
    return f"{p.name}=..."


def _called(program: Any) -> Any:
    """That of a model whose parameters are those of its call."""
    return program.forward if hasattr(program, "forward") and hasattr(program, "state_dict") else program


def arrays_in(held: Any) -> Iterator[Any]:
    """The arrays in tuples, lists and dicts."""
    if isinstance(held, tuple | list):
        for x in held:
            yield from arrays_in(x)
    elif isinstance(held, Mapping):
        yield from arrays_in(list(held.values()))
    elif _of(held) is not None:
        yield held


def _kind(x: Any) -> str:
    of = _of(x)
    return ".".join(of) if of is not None else type(x).__name__


def _of(x: Any) -> tuple[str, str] | None:
    """("torch", "Tensor") and the like for an array; neither framework is imported to find out."""
    found = _ARRAYS.get(type(x).__module__.partition(".")[0])
    return found if found is not None and hasattr(x, "shape") and hasattr(x, "dtype") else None
