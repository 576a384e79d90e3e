"""The table at the end of a run: strict accuracies of every policy, the start model's first, where the judge checks."""

from typing import Any

from megatron_sppo.selfplay.summary import result_table


def rate(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, "num_prompts": 20}


def entry(iteration: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "judge": "verifiable:ifeval",
        "win_rate_vs_base": rate(0.55),
        "win_rate_vs_previous": rate(0.53),
        "mean_response_tokens": 40.0,
        "seconds": {"train": 80.0},
        **more,
    }


def accuracy(prompts: float, instructions: float) -> dict[str, Any]:
    return {"prompt_level": rate(prompts), "instruction_level": rate(instructions), "num_instructions": 30}


def test_accuracies_stand_beside_win_rates_and_begin_with_the_start_model() -> None:
    base = accuracy(0.12, 0.30)
    first = {"policy": accuracy(0.15, 0.36), "base": base, "previous": base}
    second = {"policy": accuracy(0.20, 0.41), "base": base, "previous": first["policy"]}
    lines = result_table({"iterations": [entry(1, accuracy=first), entry(2, accuracy=second)]}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["start", "1", "2"]
    for line, (instructions, prompts) in zip(
        lines[2:], (("30.0", "12.0"), ("36.0", "15.0"), ("41.0", "20.0")), strict=True
    ):
        assert f"{instructions} %" in line and f"{prompts} %" in line
        assert line.index(f"{instructions} %") == lines[0].index("instructions held")
        assert line.index(f"{prompts} %") == lines[0].index("prompts held")


def test_judges_that_compare_have_the_table_of_before() -> None:
    lines = result_table({"iterations": [entry(1)]}).splitlines()
    assert "held" not in lines[0] and len(lines) == 3
