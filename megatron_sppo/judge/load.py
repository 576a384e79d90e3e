"""How a SPEC such as `pairrm:DIR`, `rules:concise` or `endpoint:URL` becomes a judge."""

from __future__ import annotations

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.protocol import Judge, JudgeIdentity

SPEC_FORMS = "pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, endpoint:URL, matrices:FILE, rules:concise or rules:cyclic"

READS = {"paper": "message", "official": "template"}
"""What a judge that was trained on plain messages reads of a prompt, by --preset."""


def load_judge(
    spec: str,
    *,
    preset: str = "paper",
    one_order: bool = False,
    dtype: str | None = None,
    max_requests: int | None = None,
    verdict_tokens: int = 1,
    after: str | None = None,
    device: str | None = None,
) -> Judge:
    """Load the judge that a SPEC names -> Judge. Each kind takes the settings that concern it.

    Args:
        preset: "paper" or "official", as on the command line: what PairRM reads, and the rule that makes preferences.
        one_order: ask each pair in one order only and take L_ji = -L_ij: an approximation, half the cost, position
            bias kept. PairRM and endpoints only.
        dtype: precision of a local model, "float32" or "bfloat16"; None: float32 on the CPU, bfloat16 on a GPU.
        max_requests: most requests of this process to an endpoint; None: no limit.
        verdict_tokens: tokens that an endpoint may answer with; more than 1 for one that reasons first.
        after: judge only what follows this text in an answer, such as "</think>"; None: whole answers.
        device: of a local model, "cpu" or "cuda"; None: a GPU where there is one.

    Raises:
        ConfigError: unknown SPEC or setting, or a judge that cannot be loaded.
        ConversionError: a weight of the judge is not in its files.
    """
    _check(preset, after)
    kind, _, rest = spec.partition(":")
    judge: Judge
    if rest and kind == "rules":
        from megatron_sppo.judge.rules import load_rules

        judge = load_rules(rest)
    elif rest and kind == "matrices":
        from megatron_sppo.judge.matrices import MatricesJudge

        judge = MatricesJudge(rest, rule=preset)
    elif rest and kind == "pairrm":
        from megatron_sppo.judge.pairrm.judge import PairRMJudge

        judge = PairRMJudge(rest, reads=READS[preset], one_order=one_order, dtype=dtype, device=device)
    elif rest and kind == "reward":
        from megatron_sppo.judge.reward import RewardJudge

        judge = RewardJudge(rest, dtype=dtype, device=device)
    elif rest and kind == "endpoint":
        from megatron_sppo.judge.endpoint import EndpointJudge

        judge = EndpointJudge(rest, one_order=one_order, max_requests=max_requests, verdict_tokens=verdict_tokens)
    else:
        raise ConfigError(f"--judge {spec!r} is not a judge. Use {SPEC_FORMS}.")
    if after is None:
        return judge
    from megatron_sppo.judge.conclusion import ConclusionJudge

    return ConclusionJudge(judge, after)


def identify_model_judge(
    spec: str, *, dtype: str, preset: str = "paper", one_order: bool = False, after: str | None = None
) -> JudgeIdentity:
    """Name the judge that `load_judge` would load, of a kind that is a model (`is_model_judge`), by its files.

    Raises:
        ConfigError: unknown setting, or no such checkpoint.
    """
    _check(preset, after)
    kind, _, rest = spec.partition(":")
    if kind == "pairrm":
        from megatron_sppo.judge.pairrm.judge import pairrm_identity

        identity = pairrm_identity(rest, reads=READS[preset], one_order=one_order, dtype=dtype)
    else:
        from megatron_sppo.judge.reward import reward_identity

        identity = reward_identity(rest, dtype=dtype)
    if after is None:
        return identity
    from megatron_sppo.judge.conclusion import conclusion_identity

    return conclusion_identity(identity, after)


def is_model_judge(spec: str) -> bool:
    """Tell whether a SPEC names a model that is loaded where it judges: one that takes a GPU, and is not sent about."""
    kind, _, rest = spec.partition(":")
    return bool(rest) and kind in ("pairrm", "reward")


def _check(preset: str, after: str | None) -> None:
    if preset not in READS:
        raise ConfigError(f"--preset {preset!r} is unknown. Use --preset paper or --preset official.")
    if after is not None and not after.strip():
        raise ConfigError('--judge-after is empty. Use --judge-after "</think>", or leave it out.')
