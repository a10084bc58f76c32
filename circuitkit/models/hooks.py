"""Functions attached to ports of a running module, and the module kept quiet meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from circuitkit.models.wiring import Port

T = TypeVar("T")
Hook = tuple[Port, Callable[[Tensor], Tensor | None]]


def keeper(store: dict[T, Tensor], key: T) -> Callable[[Tensor], None]:
    """A hook that keeps what it sees."""

    def keep(x: Tensor) -> None:
        store[key] = x

    return keep


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach functions to ports; each may return a replacement for what it saw. Removed on exit, also on error."""
    with ExitStack() as stack:
        for port, function in hooks:
            handle = (
                port.module.register_forward_hook(_on_output(function))
                if port.side == "out"
                else port.module.register_forward_pre_hook(_on_input(function))
            )
            stack.callback(handle.remove)
        yield


def _on_output(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        new = function(output[0])
        return None if new is None else (new, *output[1:])

    return hook


def _on_input(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        new = function(args[0])
        return None if new is None else (new, *args[1:])

    return hook


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; both exactly as found afterwards."""
    # A bridge keeps the Hugging Face module that it runs outside its own tree, with dropout modules of its own.
    inner = getattr(module, "original_model", None)
    roots = [module, inner] if isinstance(inner, nn.Module) else [module]
    training = [m for root in roots for m in root.modules() if m.training]
    learning = [p for root in roots for p in root.parameters() if p.requires_grad]
    try:
        for m in training:
            m.training = False
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for m in training:
            m.training = True
        for p in learning:
            p.requires_grad_(True)
