"""`FeatureFaithfulness`: what a feature circuit keeps of a behaviour, next to random circuits and analytic scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitkit.functional.stats import bootstrap_mean, bootstrap_ratio
from circuitkit.result import LEAST_EXAMPLES, LEAST_SHARE

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class FeatureFaithfulness:
    """What a feature circuit does in the running model, next to its analytic scores and random circuits.

    Args:
        clean: metric of the whole model, of each prompt.
        nothing: with all latents ablated.
        circuit: with those outside the circuit ablated.
        complement: with those of the circuit ablated.
        random: of each random circuit, of each prompt.
        n_latents: latents in each prompt's circuit (latent and position).
        n_active: active latents of each prompt.
        replacement_score: of the graph as it was given, mean over prompts.
        completeness_score: the same.
        mode: what was computed anew.
        errors: which errors stayed: the graph's own, all (``kept``) or none (``removed``).
        ablated: what ablated latents carry: ``zero`` or ``mean``.
        seed: of the random circuits.
    """

    clean: tuple[float, ...]
    nothing: tuple[float, ...]
    circuit: tuple[float, ...]
    complement: tuple[float, ...]
    random: tuple[tuple[float, ...], ...]
    n_latents: tuple[int, ...]
    n_active: tuple[int, ...]
    replacement_score: float
    completeness_score: float
    mode: str
    errors: str
    ablated: str
    seed: int

    @property
    def faithfulness(self) -> float | None:
        """Share of the metric that the circuit keeps; None where ablating all latents changes nothing."""
        return self._share(self.circuit)

    @property
    def completeness(self) -> float | None:
        """Share of the metric that is left without the circuit."""
        return self._share(self.complement)

    @property
    def random_faithfulness(self) -> tuple[float, ...]:
        """Faithfulness of each random circuit."""
        found = [self._share(values) for values in self.random]
        return tuple(share for share in found if share is not None)

    @property
    def faithfulness_interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval over prompts; None for fewer than `LEAST_EXAMPLES`."""
        return self._interval(self.circuit)

    @property
    def gap_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of what ablating all latents takes from the metric."""
        gaps = [c - n for c, n in zip(self.clean, self.nothing, strict=True)]
        return bootstrap_mean(torch.tensor(gaps, dtype=torch.float64), seed=self.seed)

    @property
    def completeness_interval(self) -> tuple[float, float] | None:
        """The same of completeness."""
        return self._interval(self.complement)

    @property
    def verdict(self) -> str:
        """In the words of `circuitkit.result.Result`; ``not known`` where prompts are too few for an interval."""
        share, prompts = self.faithfulness, len(self.clean)
        if share is None:
            return "no better than chance: ablating all latents changes nothing, so faithfulness is undefined"
        if not any(self.n_latents):
            return "no better than chance: the circuit has no latents; prune less"
        if self.gap_interval[0] <= 0:
            return "no better than chance: ablating all latents does not lower the metric, so there is no behaviour"
        if share < LEAST_SHARE:
            return f"no better than chance: the circuit keeps less than {LEAST_SHARE:.0%} of the behaviour"
        if not self.random_faithfulness:
            return "not known: there is no other circuit of this size to compare with"
        interval = self.faithfulness_interval
        if (share if interval is None else interval[0]) <= max(self.random_faithfulness):
            return "no better than chance: a random circuit of the same size does as well"
        if interval is None:
            few = "1 prompt gives" if prompts == 1 else f"{prompts} prompts give"
            return f"not known: above every random circuit, but {few} no interval; use {LEAST_EXAMPLES} or more"
        return "better than chance"

    @property
    def better_than_chance(self) -> bool:
        """Whether the circuit carries more of the metric than every random circuit of its size."""
        return self.verdict.startswith("better than chance")

    def __repr__(self) -> str:
        random = self.random_faithfulness
        mean = f"{sum(random) / len(random):.3f} ({min(random):.3f} to {max(random):.3f})" if random else "none"
        return "\n".join(
            (
                f"FeatureFaithfulness({len(self.clean)} prompts, {sum(self.n_latents)} of {sum(self.n_active)} "
                f"latents; {self.mode}, errors: {self.errors}, ablated: {self.ablated})",
                f"faithfulness   {_number(self.faithfulness)} {_range(self.faithfulness_interval)}",
                f"completeness   {_number(self.completeness)} {_range(self.completeness_interval)}   of the complement",
                f"random         {mean}   {len(random)} circuits of the same size",
                f"analytic       replacement {self.replacement_score:.3f}, completeness {self.completeness_score:.3f}",
                f"verdict        {self.verdict}",
            )
        )

    def plot(self) -> go.Figure:
        """Circuit, complement and random circuits on one scale, from nothing (0) to the model (1)."""
        from circuitkit.figures.predicted_measured import faithfulness_strip

        return faithfulness_strip(self)

    def _share(self, values: Sequence[float]) -> float | None:
        gap = sum(self.clean) - sum(self.nothing)
        if abs(gap) <= 1e-5 * max(sum(map(abs, self.clean)), sum(map(abs, self.nothing)), 1e-6):
            return None
        return (sum(values) - sum(self.nothing)) / gap

    def _interval(self, values: Sequence[float]) -> tuple[float, float] | None:
        if len(self.clean) < LEAST_EXAMPLES:
            return None
        kept, nothing, clean = (torch.tensor(x, dtype=torch.float64) for x in (values, self.nothing, self.clean))
        return bootstrap_ratio(kept - nothing, clean - nothing, seed=self.seed)


def _number(share: float | None) -> str:
    return "undefined" if share is None else f"{share:.3f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"({interval[0]:.3f} to {interval[1]:.3f})"
