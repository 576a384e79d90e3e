"""Log-probabilities of fixed texts: what a model computes, told apart from what another one does.

The truth is computed here from the Hugging Face directory by transformers, in float32 on the CPU. The files stay mapped
and one module at a time is widened, so memory holds a layer, not the model: a model of 70 billion is read once. (The
experts of a mixture are the exception: transformers fuses them, which makes a copy.) An adapter is added to the widened
weights.

A server computes in its own precision, so it agrees up to rounding. Measured with SmolLM2-135M in bfloat16: vLLM's
values lie 0.018 standard deviations of the truth from it (root mean square), transformers' own as far. Unrelated models
of one shape are more than one standard deviation apart; one small step of training can be less than the tolerance, and
then only the checksum (`served_weights`) tells.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.errors import ConversionError, DataError

# N = probes, S = tokens of the longest, V = vocabulary

MOST_TOKENS = 48
"""Of a probe."""
TOLERANCES = {"float32": 0.001}
"""Distance that rounding explains, by the precision that the server is known to compute in."""
TOLERANCE = 0.05
"""The same in 16 bits, or unknown: about three times what was measured."""

_TEXTS = (
    "The river rises in the mountains, runs past two old mills and the market town, and reaches the sea after eighty "
    "miles. In spring, when the snow melts, it floods the meadows.",
    "Question: A train leaves at 9:40 and arrives at 13:05 with a stop of 25 minutes. How long does it move? Answer: "
    "Without the stop exactly 3 hours.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
    "        return ordered[middle]\n",
    "Der Zug hielt an einem Bahnhof, dessen Namen niemand kannte. Sind wir schon da? fragte das Kind.",
    '{"order": 4711, "items": [{"name": "lamp", "price": 19.95, "count": 2}], "paid": false}',
    "Sorry to write so late. The parcel came on Tuesday, but the blue cup was broken, and the receipt shows another "
    "total than the shop's own page does.",
)
"""Prose, arithmetic, code, another language, JSON, a letter: much of the embedding takes part."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Fixed texts and what the policy gives for them."""

    token_ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]
    """Of each token but the first, given those before it; nats."""

    def distance(self, log_probs: Sequence[Sequence[float]]) -> float:
        """Measure how far other log-probabilities lie -> root mean square, in standard deviations of the truth."""
        pairs = [
            pair
            for own, others in zip(self.log_probs, log_probs, strict=True)
            for pair in zip(own, others, strict=True)
        ]
        mean = math.fsum(a for a, _ in pairs) / len(pairs)
        spread = math.fsum((a - mean) ** 2 for a, _ in pairs)
        off = math.fsum((a - b) ** 2 for a, b in pairs)
        return math.inf if not math.isfinite(off) else math.sqrt(off / spread) if spread else math.sqrt(off)


def compute_probes(model_dir: Path, *, adapter: PeftAdapter | None = None, most_tokens: int = MOST_TOKENS) -> Probes:
    """Give the fixed texts to the model of a Hugging Face directory -> Probes.

    Args:
        adapter: what is added to its weights.
        most_tokens: of a probe; a server's context may be shorter than MOST_TOKENS.

    Raises:
        ConversionError: the directory's weights do not make a model of transformers'.
        DataError: transformers does not know the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    token_ids = [tokenizer(text, add_special_tokens=False).input_ids[:most_tokens] for text in _TEXTS]
    token_ids = [ids for ids in token_ids if len(ids) > 1]
    try:
        # transformers' default attention leaves soft caps out in silence (5.19, sdpa_attention.py).
        model = load_pretrained(AutoModelForCausalLM, model_dir, dtype="auto", attn_implementation="eager").eval()
    except ConversionError as error:
        raise ConversionError(f"{error} Or use --server-weights trust, if the servers hold it all the same.") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the weights of servers cannot be proven: transformers does not load {model_dir} ({reason}). "
            "Use --server-weights trust if you know that the servers hold them."
        ) from None
    _widen_one_at_a_time(model, adapter)
    longest = max(len(ids) for ids in token_ids)
    # Padded behind, where causal attention does not look.
    tokens_NS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in token_ids])
    with torch.inference_mode():
        logits_NSV = model(input_ids=tokens_NS, use_cache=False).logits
        log_probs = [
            logits_SV[: len(ids) - 1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            for ids, logits_SV in zip(token_ids, logits_NSV, strict=True)
        ]
    return Probes(
        token_ids=tuple(tuple(ids) for ids in token_ids),
        log_probs=tuple(tuple(values.tolist()) for values in log_probs),
    )


def _widen_one_at_a_time(model: Any, adapter: PeftAdapter | None) -> None:
    """Let each module compute in float32 with weights that are widened, and adapted, for its call alone."""
    import torch

    adapted = dict(_adapted_parameters(model, adapter)) if adapter is not None else {}

    def widen(module: Any, *_: Any) -> None:
        module.mapped = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        for name, parameter in module.named_parameters(recurse=False):
            added = adapted.get((module, name), [])
            parameter.data = module.mapped[name].to(torch.float32, copy=bool(added))
            for place, of_adapter in added:
                assert adapter is not None
                parameter.data[place] += adapter.delta(of_adapter)

    def put_back(module: Any, *_: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = module.mapped[name]
        del module.mapped

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(put_back)


def add_adapter(model: Any, adapter: PeftAdapter) -> None:
    """Add an adapter to the float32 weights of a model of transformers', in place.

    Raises:
        DataError: it adapts a module that the model does not have.
    """
    for (module, name), added in _adapted_parameters(model, adapter):
        for place, of_adapter in added:
            getattr(module, name).data[place] += adapter.delta(of_adapter)


_EXPERT = re.compile(r"(?P<layer>.*\.layers\.\d+)\..*\.experts\.(?P<expert>\d+)\.(?P<name>\w+)")
_PARTS_OF_EXPERTS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
"""An expert's matrices -> (the parameter that transformers 5 fuses them into, which half of its rows)."""


def _adapted_parameters(model: Any, adapter: PeftAdapter) -> Iterator[tuple[tuple[Any, str], list[tuple[Any, str]]]]:
    """Find what an adapter is added to -> ((module, parameter), [(index of the part, the adapter's name of it)]).

    Raises:
        DataError: a module that transformers' model does not have.
    """
    modules = dict(model.named_modules())
    experts = {name.rpartition(".mlp.")[0]: module for name, module in modules.items() if name.endswith(".mlp.experts")}
    found: dict[tuple[Any, str], list[tuple[Any, str]]] = {}
    for name in adapter.factors:
        match = _EXPERT.fullmatch(name)
        if name in modules and getattr(modules[name], "weight", None) is not None:
            found[modules[name], "weight"] = [(..., name)]
        elif match is not None and match["layer"] in experts and match["name"] in _PARTS_OF_EXPERTS:
            parameter, half = _PARTS_OF_EXPERTS[match["name"]]
            module, expert = experts[match["layer"]], int(match["expert"])
            rows = getattr(module, parameter).shape[1]
            place = slice(None) if half is None else slice(half * rows // 2, (half + 1) * rows // 2)
            found.setdefault((module, parameter), []).append(((expert, place), name))
        else:
            raise DataError(
                f"{adapter.directory} adapts {name}, which transformers' model does not have. "
                "Use --server-weights trust if you know that the servers hold it."
            )
    yield from found.items()
