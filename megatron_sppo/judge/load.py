"""How a SPEC such as `pairrm:DIR`, `rules:concise` or `endpoint:URL` becomes a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.protocol import Judge, JudgeIdentity, Verdict
from megatron_sppo.rollout.conversations import ANSWER_COLUMNS

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

SPEC_FORMS = (
    "pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, gpm:HUB_ID_OR_DIR, endpoint:URL, verifiable:ifeval, verifiable:math, "
    "python:FILE:FUNCTION, matrices:FILE, rules:concise or rules:cyclic"
)

NEEDED_COLUMNS = {
    "verifiable:ifeval": frozenset({"instruction_id_list"}),
    "verifiable:math": frozenset(ANSWER_COLUMNS),
}
"""Of a prompt, one of these, by judge: without it no answer to it can be checked."""

MODEL_KINDS = ("pairrm", "reward", "gpm")
"""Kinds of judges that are models: of the hub, or directories."""

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
    scorer_seconds: float = 10.0,
    similarity_gate: float | None = None,
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
        scorer_seconds: longest time of one answer's check, for judges that check.
        similarity_gate: answers whose resemblance is this or more are equals; None: only identical ones are.
        after: judge only what follows this text in an answer, such as "</think>"; None: whole answers.
        device: of PairRM, a reward or a preference model, "cpu" or "cuda"; None: a GPU where there is one.

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
    elif rest and kind == "gpm":
        from megatron_sppo.judge.gpm import GeneralPreferenceJudge

        judge = GeneralPreferenceJudge(rest, dtype=dtype, device=device)
    elif rest and kind == "verifiable":
        from megatron_sppo.judge.verifiable import load_verifiable

        judge = load_verifiable(rest, seconds=scorer_seconds)
    elif rest and kind == "python":
        from megatron_sppo.judge.verifiable import load_python

        judge = load_python(rest, seconds=scorer_seconds)
    elif rest and kind == "endpoint":
        from megatron_sppo.judge.endpoint import EndpointJudge

        judge = EndpointJudge(rest, one_order=one_order, max_requests=max_requests, verdict_tokens=verdict_tokens)
    else:
        raise ConfigError(f"--judge {spec!r} is not a judge. Use {SPEC_FORMS}.")
    return _wrapped(judge, similarity_gate=similarity_gate, after=after)


def identify_judge(
    spec: str,
    *,
    dtype: str,
    preset: str = "paper",
    one_order: bool = False,
    similarity_gate: float | None = None,
    after: str | None = None,
    **settings: Any,
) -> JudgeIdentity:
    """Name the judge that `load_judge` would load with the same arguments -> JudgeIdentity.

    PairRM, reward and preference models are known by their files, unloaded; any other judge is loaded for it.

    Raises:
        ConfigError: as `load_judge`.
    """
    kind, _, rest = spec.partition(":")
    if not rest or kind not in MODEL_KINDS:
        shared = {"preset": preset, "one_order": one_order, "similarity_gate": similarity_gate, "after": after}
        judge = load_judge(spec, dtype=dtype, **shared, **settings)  # type: ignore[arg-type]
        return JudgeIdentity(name=judge.name, fingerprint=judge.fingerprint)
    _check(preset, after)
    if kind == "pairrm":
        from megatron_sppo.judge.pairrm.judge import pairrm_identity

        identity = pairrm_identity(rest, reads=READS[preset], one_order=one_order, dtype=dtype)
    elif kind == "gpm":
        from megatron_sppo.judge.gpm import gpm_identity

        identity = gpm_identity(rest, dtype=dtype)
    else:
        from megatron_sppo.judge.reward import reward_identity

        identity = reward_identity(rest, dtype=dtype)
    judge = _wrapped(_Unloaded(identity), similarity_gate=similarity_gate, after=after)
    return JudgeIdentity(name=judge.name, fingerprint=judge.fingerprint)


def canonical_spec(spec: str) -> str:
    """Spell a SPEC in the one way of all that name the same judge: files by their whole paths -> SPEC."""
    place = judge_place(spec)
    if place is None:
        return spec
    kind, _, rest = spec.partition(":")
    function = f":{rest.rpartition(':')[2]}" if kind == "python" else ""
    return f"{kind}:{place.resolve()}{function}"


def judge_place(spec: str) -> Path | None:
    """Find the file or directory of this machine that a SPEC names -> path; None: it names none, or none is there."""
    kind, _, rest = spec.partition(":")
    place = rest.rpartition(":")[0] if kind == "python" else rest if kind in (*MODEL_KINDS, "matrices") else ""
    return Path(place) if place and Path(place).exists() else None


class _Unloaded:
    """Stands for a judge that is known and not loaded."""

    def __init__(self, identity: JudgeIdentity) -> None:
        self.name, self.fingerprint = identity.name, identity.fingerprint
        self.counts: Counter[str] = Counter()

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        raise AssertionError(f"{self.name} is not loaded: it cannot judge {len(groups)} groups")


def _wrapped(judge: Judge, *, similarity_gate: float | None, after: str | None) -> Judge:
    """Put around a judge what changes its verdicts, or what it sees -> Judge."""
    if similarity_gate is not None:
        from megatron_sppo.judge.similarity import SimilarityGate

        judge = SimilarityGate(judge, similarity_gate)
    if after is None:
        return judge
    from megatron_sppo.judge.conclusion import ConclusionJudge

    return ConclusionJudge(judge, after)


def _check(preset: str, after: str | None) -> None:
    if preset not in READS:
        raise ConfigError(f"--preset {preset!r} is unknown. Use --preset paper or --preset official.")
    if after is not None and not after.strip():
        raise ConfigError('--judge-after is empty. Use --judge-after "</think>", or leave it out.')
