"""The chunked gated delta rule against the recurrence of its docstring, token by token.

Not shown here: the layer around it, which the family tests hold against Hugging Face's.
"""

import pytest
import torch
from torch import Tensor

from megatron_sppo.model.delta_rule import CHUNK, gated_delta_rule

# B = 2 sequences, N = 3 heads, K = 5 and V = 7 channels


def inputs(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(2, 3, *sizes, generator=generator)

    query, key = (torch.nn.functional.normalize(normal(length, 5), dim=-1) for _ in range(2))
    return {
        "query": query,
        "key": key,
        "value": normal(length, 7),
        "decay": -normal(length).abs(),
        "rate": normal(length).sigmoid(),
        "state": normal(5, 7),
    }


def token_by_token(*, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    outputs = []
    for t in range(query.shape[2]):
        state = decay[:, :, t, None, None].exp() * state
        read = torch.einsum("bnkv,bnk->bnv", state, key[:, :, t])
        correction = rate[:, :, t, None] * (value[:, :, t] - read)
        state = state + torch.einsum("bnk,bnv->bnkv", key[:, :, t], correction)
        outputs.append(torch.einsum("bnkv,bnk->bnv", state, query[:, :, t]))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_chunks_compute_the_recurrence_and_its_gradients(length: int) -> None:
    found, expected = inputs(length), {name: value.double() for name, value in inputs(length).items()}
    for tensors in (found, expected):
        for tensor in tensors.values():
            tensor.requires_grad_()
    output, truth = gated_delta_rule(**found)[0], token_by_token(**expected)
    torch.testing.assert_close(output.double(), truth, rtol=0, atol=1e-5)
    weights = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (output.double() * weights).sum().backward()
    (truth * weights).sum().backward()
    for name, tensor in found.items():
        gradient = expected[name].grad
        assert tensor.grad is not None and gradient is not None
        bound = 1e-5 * gradient.abs().max().item()  # as in the layout tests: of the tensor's largest entry
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=0, atol=bound)


def test_a_sequence_in_two_parts_is_the_whole_one() -> None:
    """Shared prompts rest on it: a response goes on from its prompt's state."""
    whole = inputs(CHUNK + 9)
    state, parts = whole.pop("state"), []
    expected, last = gated_delta_rule(**whole, state=state)
    for part in (slice(0, 20), slice(20, None)):
        output, state = gated_delta_rule(**{name: value[:, :, part] for name, value in whole.items()}, state=state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-5)
