"""`Model`: a module with its wiring. It records runs and replays blocks with edits; it holds no activations.

A run is recorded once through the user's module. Everything after that (gradients, circuits, patched edges) replays the
blocks from a chosen layer with the calls that were recorded, so no layer is computed that an edit cannot reach, and
logits are computed at the answer positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.errors import UnsupportedModel
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.calls import Call, repeat_call, split_call
from circuitkit.models.hooks import Hook, hooked, keeper, quiet
from circuitkit.models.operations import EdgeOperations
from circuitkit.models.wiring import Port, Wiring
from circuitkit.shapes import Logits, Stream, Tokens

if TYPE_CHECKING:
    from circuitkit.models.interventions import Intervened, Intervention


@dataclass(frozen=True, eq=False)
class Run:
    """What one recorded run left behind, detached.

    Args:
        batch: number of examples.
        calls: arguments of each block besides the stream.
        inputs: the stream before each block, and after the last.
        writes: the tensor of each write site, as `WriteSite.kept` gives it.
    """

    batch: int
    calls: tuple[Call, ...]
    inputs: tuple[Float[Tensor, "_ _ _"], ...]
    writes: tuple[Float[Tensor, "_ _ _ _"], ...]

    def rows(self, index: slice) -> Run:
        """The examples chosen by a slice."""
        take = torch.arange(self.batch, device=self.inputs[0].device)[index]
        return Run(
            len(take),
            tuple(repeat_call(call, take, self.batch) for call in self.calls),
            tuple(x[index] for x in self.inputs),
            tuple(w[index] for w in self.writes),
        )


class Model(EdgeOperations):
    """A trained network, ready to be recorded and replayed.

    Args:
        module: what is run on tokens.
        wiring: where components write and read.
        forward: ``(module, tokens) -> None``, how to run it without a cache.
        name: for messages and files.
        d_vocab: number of token ids.
        n_ctx: longest input.
        tokenizer: a Hugging Face tokenizer or None.
        card: what is known about it (a zoo model's JSON), or {}.
    """

    def __init__(
        self,
        module: nn.Module,
        wiring: Wiring,
        *,
        forward: Callable[[nn.Module, Tensor], Any],
        name: str,
        d_vocab: int,
        n_ctx: int,
        tokenizer: Any = None,
        card: dict[str, Any] | None = None,
    ) -> None:
        self.module, self.wiring = module, wiring
        self.name, self.d_vocab, self.n_ctx = name, d_vocab, n_ctx
        self.tokenizer, self.card = tokenizer, card or {}
        self.causal = True
        self._forward = forward
        self._is_quiet = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def __repr__(self) -> str:
        g = self.graph
        return f"Model({self.name}: {len(g.sources)} writers, {len(g.destinations)} readers, {g.n_edges} edges)"

    def check(self) -> None:
        """Test the wiring's laws by experiment. Raises UnsupportedModel naming the law, the layer and the gap."""
        from circuitkit.models.laws import check_laws

        check_laws(self)

    def split_mlps(self, group: int = 1, layers: Sequence[int] | None = None) -> Model:
        """The same module with MLPs (of some layers) as groups of neurons, checked; see `circuitkit.models.neurons`."""
        from circuitkit.models.neurons import split_mlps

        return split_mlps(self, group, layers)

    def intervene(
        self,
        interventions: Sequence[Intervention],
        tokens: Tokens,
        *,
        frozen: bool = False,
        constrained: Sequence[int] = (),
    ) -> Intervened:
        """Run under interventions on components or latents; see `circuitkit.models.interventions`."""
        from circuitkit.models.interventions import intervene

        return intervene(self, interventions, tokens, frozen=frozen, constrained=constrained)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode and frozen parameters inside, as found afterwards; free when already inside one."""
        if self._is_quiet:
            yield
            return
        with quiet(self.module):
            self._is_quiet = True
            try:
                yield
            finally:
                self._is_quiet = False

    def record(self, tokens: Tokens) -> Run:
        """Run the module once and keep what a replay needs.

        Raises:
            UnsupportedModel: if an activation is not finite; names the first block where it is not.
        """
        calls: list[Call] = []
        inputs: list[Tensor] = []
        writes: dict[int, Tensor] = {}

        def keep_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, call = split_call(args, kwargs)
            inputs.append(x.detach())
            calls.append(call)

        def keep_last(x: Tensor) -> None:
            inputs.append(x.detach())
            raise _Stop  # the unembedding of every position is not needed

        hooks: list[Hook] = [(self.wiring.final, keep_last)]
        for i, site in enumerate(self.wiring.write_sites):
            if site.block >= 0:
                hooks.append((site.port, keeper(writes, i)))
        with ExitStack() as stack, torch.no_grad(), suppress(_Stop):
            stack.enter_context(self.quiet())
            stack.enter_context(hooked(hooks))
            for block in self.wiring.blocks:
                handle = block.register_forward_pre_hook(keep_call, with_kwargs=True)
                stack.callback(handle.remove)
            self._forward(self.module, tokens.to(self.device))
        writes[0] = inputs[0]
        _check_finite(inputs)
        shaped = (
            site.kept(writes[i].detach().reshape(*writes[i].shape[:2], site.n, -1))
            for i, site in enumerate(self.wiring.write_sites)
        )
        return Run(len(tokens), tuple(calls), tuple(inputs), tuple(shaped))

    def start(self, tokens: Tokens) -> Stream:
        """The stream before the first block, without running any block."""
        entered: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(split_call(args, kwargs)[0].detach())
            raise _Stop

        with ExitStack() as stack, torch.no_grad(), suppress(_Stop):
            stack.enter_context(self.quiet())
            handle = self.wiring.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
            stack.callback(handle.remove)
            self._forward(self.module, tokens.to(self.device))
        return entered[0]

    def replay(self, run: Run, start: int, x: Stream, rows: Int[Tensor, " row"], hooks: Sequence[Hook] = ()) -> Stream:
        """Pass a stream through the blocks from ``start`` on, with hooks, and return it.

        Args:
            run: whose block calls to repeat.
            start: first block.
            x: the stream before that block, one row per entry of ``rows``.
            rows: which example of the run each row continues.
            hooks: what to look at or replace on the way.
        """
        memo: dict[int, Any] = {}
        with self.quiet(), hooked(hooks):
            for block, call in zip(self.wiring.blocks[start:], run.calls[start:], strict=True):
                args, kwargs = repeat_call(call, rows, run.batch, memo)
                out = block(x, *args, **kwargs)
                x = out if isinstance(out, Tensor) else out[0]
        return x

    def replay_block(
        self, run: Run, block: int, x: Stream, rows: Int[Tensor, " row"], hooks: Sequence[Hook], stop: Port
    ) -> Tensor:
        """Pass a stream through one block with hooks, up to a port, and return what passes there.

        Nothing behind the port is computed: a head's output under another query costs one attention.
        """
        seen: dict[int, Tensor] = {}

        def halt(y: Tensor) -> None:
            seen[0] = y
            raise _Stop

        with self.quiet(), hooked([*hooks, (stop, halt)]), suppress(_Stop):
            args, kwargs = repeat_call(run.calls[block], rows, run.batch)
            self.wiring.blocks[block](x, *args, **kwargs)
        return seen[0]

    def logits(self, x: Stream, positions: Int[Tensor, "batch answer"]) -> Logits:
        """Logits at the answer positions of a stream that left the last block, in float32 or better."""
        with self.quiet():
            picked = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
            return at_least_float32(self.wiring.tail(picked))


class _Stop(Exception):
    """Raised by our own hook to end a forward pass early."""


def _check_finite(inputs: list[Tensor]) -> None:
    for i, x in enumerate(inputs):
        if not torch.isfinite(x).all():
            where = f"entering block {i}" if i < len(inputs) - 1 else "leaving the last block"
            narrow = "; float16 overflows easily, load the model in bfloat16 or float32" * (x.dtype == torch.float16)
            maker = f"block {i - 1}" if i else "the embedding"
            raise UnsupportedModel(
                f"the stream {where} holds NaN or infinite values: {maker} makes them; check its weights{narrow}"
            )
