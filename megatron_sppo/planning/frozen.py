"""What autograd keeps of a layer whose weights are frozen under adapters, from the list of one that is trained.

A product with a frozen weight keeps no input; adapters keep the inputs of their own, in the weights' type whatever the
products' (so FP8 saves nothing there), and A x, `rank` channels for each module. Held against real forward passes for
the torch spec, computed for Transformer Engine's, as the lists themselves (`activations`).
"""

from dataclasses import dataclass

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.adapter_file import adapted_modules
from megatron_sppo.planning.parameters import Grid


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of a rank that every list below is made of."""

    tokens: int
    between: int
    hidden: int
    query: int
    key: int
    head: int
    heads: int
    width: int
    shared: int
    """Feed-forward channels of the shared expert."""
    has_experts: bool
    type_bytes: int

    @property
    def residual(self) -> int:
        """Bytes of [n, H]."""
        return self.between * self.hidden * self.type_bytes


def with_adapters(
    items: dict[str, int], architecture: Architecture, grid: Grid, sizes: Sizes, *, engine: bool, is_fp8: bool
) -> dict[str, int]:
    """Change what a layer keeps, {what: bytes}, to what it keeps with adapters on frozen weights -> {what: bytes}."""
    assert grid.adapters is not None
    modules = adapted_modules(architecture, grid.adapters.targets)
    adapted = {module.linear for module in modules}
    narrow = sizes.type_bytes
    product = 1 if is_fp8 else narrow
    items = dict(items)
    # Tokens that go through the feed-forward matrices here: each goes to several experts.
    inner = sizes.tokens
    if sizes.has_experts:
        inner = sizes.between * (architecture.moe_router_topk or 0)
    unit = "experts" if sizes.has_experts else "feed-forward"
    between = inner if sizes.has_experts else sizes.between
    inputs = {
        "linear_qkv": ("input of linear_qkv", sizes.between * sizes.hidden),
        "linear_proj": ("input of linear_proj", sizes.tokens * sizes.query),
        "linear_fc1": (unit, between * sizes.hidden),
        "linear_fc2": (unit, inner * sizes.width),
    }
    for name, (item, elements) in inputs.items():
        items[item] += elements * ((narrow if name in adapted else 0) - product)
    if sizes.shared:
        items["shared experts"] -= sizes.tokens * sizes.shared * product
    if engine and is_fp8 and "linear_proj" in adapted and "attention" in items:
        items["attention"] -= sizes.tokens * sizes.query * narrow  # its output is the adapter's input
    if not engine:  # a norm keeps what it has made of its input for its weight's gradient alone
        items["norms"] -= architecture.norms_per_layer * sizes.between * sizes.hidden * narrow
        if "norms of queries and keys" in items:
            items["norms of queries and keys"] -= sizes.tokens * (sizes.query + sizes.key) * narrow
    rows = {"linear_qkv": sizes.tokens, "linear_proj": sizes.between, "linear_fc1": inner, "linear_fc2": between}
    items["adapters"] = sum(rows[module.linear] * grid.adapters.rank for module in modules) * narrow
    return items
