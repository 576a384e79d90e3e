"""The transitive and the cyclic part of pairwise comparisons: HodgeRank on the complete graph.

A = what is compared (responses of a prompt, or players); `...` = any leading shape.
Equations: Jiang, Lim, Yao and Ye 2011, "Statistical ranking and combinatorial Hodge theory", Math. Program. 127:203-244
(arXiv:0811.1067).
"""

from typing import NamedTuple

from torch import Tensor


class HodgeSplit(NamedTuple):
    """flow = transitive + cyclic, and the two are orthogonal."""

    score: Tensor
    """[..., A], the least-squares scores, of mean 0 where the flow is antisymmetric; the flow's units."""
    transitive: Tensor
    """[..., A, A], score_i - score_j: what scores explain (the gradient)."""
    cyclic: Tensor
    """[..., A, A], the rest: its sum over j is 0 for every i, and it is made of circles of three alone (the curl)."""


def hodge_split(flow: Tensor) -> HodgeSplit:
    """Split comparisons into what scores explain and what goes round in circles -> HodgeSplit.

    The scores minimise sum_ij (f_ij - (s_i - s_j))^2 with equal weights. On a complete graph the normal equations have
    the closed form s_i = mean_j f_ij (the graph Laplacian is A times the identity on vectors of mean 0: Borda's count),
    and there is no third, harmonic part: every circle is a sum of triangles.

    Args:
        flow: [..., A, A] antisymmetric, f_ij > 0 where i is preferred to j. Of a Bradley-Terry judge's log-odds the
            cyclic part is 0; of rock-paper-scissors the transitive one.
    """
    score = flow.mean(dim=-1)
    transitive = score.unsqueeze(-1) - score.unsqueeze(-2)
    return HodgeSplit(score, transitive, flow - transitive)
