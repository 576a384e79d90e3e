"""The proof that an engine or a server computes with an adapter, before a token is sampled with it.

vLLM fails in silence here: an id or a name that was used before keeps the adapter that it had, modules that it does not
find are passed over, and on a CPU requests without an adapter that are computed beside requests with one get the
adapter's result (vLLM 0.32). So each version of an adapter has a name of its own, and is asked for by itself. Two
things must hold: log-probabilities of fixed texts are those of base and adapter (`probes`), and not, to the bit, those
that the same engine gives for the base or for another adapter; and, where the worker tells what lies in its slots
(`served_weights`), one of them holds the adapter's matrices to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.errors import some_of
from megatron_sppo.rollout.openai_server import UnusableReply
from megatron_sppo.rollout.probes import TOLERANCE, TOLERANCES, Probes
from megatron_sppo.rollout.served_weights import FACTOR_A, FACTOR_B
from megatron_sppo.rollout.weight_sums import Sums, added, weight_sum

LogProbs = Sequence[Sequence[float]]

EXPERTS = ".experts."
"""Part of the names of modules whose matrices the worker does not tell."""


@dataclass(frozen=True, kw_only=True)
class HeldAdapters:
    """What the workers of an engine say lies in their slots."""

    by_id: Mapping[str, Sums]
    dtype: str
    """Torch's name of the type that matrices are held in; "": the workers do not tell of adapters."""


def adapter_name(adapter: PeftAdapter) -> str:
    """Name a version of an adapter for engines and servers: another content is another name."""
    return f"sppo-{adapter.adapter_hash[:32]}"


def read_held(results: Sequence[Any]) -> HeldAdapters:
    """Put together what each rank's `sppo_adapters` gave -> HeldAdapters.

    Raises:
        UnusableReply: it gave something else.
    """
    by_id: dict[str, list[Sums]] = {}
    dtype = ""
    try:
        for rank in results:
            dtype = str(rank["dtype"])
            for name, sums in rank["sums"].items():
                share = {matrix: (int(value, 16), int(count)) for matrix, (value, count) in sums.items()}
                by_id.setdefault(str(name), []).append(share)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UnusableReply("sppo_adapters gave no sums of matrices") from None
    return HeldAdapters(by_id={name: added(shares) for name, shares in by_id.items()}, dtype=dtype)


def find_fault(
    adapter: PeftAdapter,
    probes: Probes,
    *,
    log_probs: LogProbs,
    others: Mapping[str, LogProbs],
    held: HeldAdapters | None,
) -> str | None:
    """Find what shows that an engine does not compute with the adapter -> in words, or None.

    Args:
        probes: what base and adapter give.
        log_probs: what the engine gives when it is asked for the adapter.
        others: what it gives otherwise: {"the base alone": ..., "the adapter NAME": ...}.
        held: what its workers hold; None: they do not tell.
    """
    same = [what for what, values in others.items() if _are_equal(values, log_probs)]
    if same and not _is_zero(adapter):
        return f"it computes with {adapter.directory} exactly what it computes with {same[0]}"
    precision = held.dtype if held is not None else ""
    tolerance = TOLERANCES.get(precision, TOLERANCE)
    if not (distance := probes.distance(log_probs)) <= tolerance:
        return (
            f"its log-probabilities of fixed texts differ by {distance:.3f} standard deviations from those of the base "
            f"with {adapter.directory}, where rounding makes up to {tolerance:g}"
        )
    if held is None or not held.dtype:
        return None
    truth = _sums(adapter, held.dtype)
    if truth in [{name: value for name, (value, _) in sums.items()} for sums in held.by_id.values()]:
        return None
    newest: Sums = next(reversed([*held.by_id.values()]), {})
    wrong = [name for name in truth.keys() | newest.keys() if newest.get(name, (0, 0))[0] != truth.get(name, 0)]
    return (
        f"none of its {len(held.by_id)} slots holds the matrices of {adapter.directory} "
        f"({len(wrong)} differ: {some_of(sorted(wrong), most=2)})"
    )


def _sums(adapter: PeftAdapter, dtype: str) -> dict[str, int]:
    """Sum the matrices as vLLM holds them: cast, and then B scaled -> {name: sum}, without those that are zero."""
    import torch

    kind, found = getattr(torch, dtype), {}
    for module in adapter.factors:
        if EXPERTS in module:
            continue
        first, second = (matrix.to(kind) for matrix in adapter.read(module))
        found[f"{module}{FACTOR_A}"] = weight_sum(first)
        found[f"{module}{FACTOR_B}"] = weight_sum(second if adapter.scaling == 1 else second * adapter.scaling)
    return {name: value for name, value in found.items() if value}


def _is_zero(adapter: PeftAdapter) -> bool:
    """Tell whether an adapter adds nothing, as one that was not trained."""
    return not any(bool(adapter.read(module)[1].any()) for module in adapter.factors)


def _are_equal(one: LogProbs, other: LogProbs) -> bool:
    return [list(values) for values in one] == [list(values) for values in other]
