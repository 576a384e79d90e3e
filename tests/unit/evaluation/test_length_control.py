"""Proves the length-controlled win rate against alpaca_eval's own code on the same annotations, its table a made one.

Not proved here: anything about AlpacaEval's own table, which a hub has; its columns are as alpaca_eval reads them.
"""

import logging

import numpy as np
import pandas as pd
import pytest
from alpaca_eval.metrics import glm_winrate as peer

from megatron_sppo.errors import DataError
from megatron_sppo.evaluation.length_control import (
    GLM_NAMES,
    Comparisons,
    comparisons_of,
    fit_length_control,
    read_difficulty_table,
    refit_length_control,
)

NUM_PROMPTS = 70


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    rng = np.random.default_rng(5)
    rows = [
        {
            "preference": rng.uniform(),
            "index": index,
            "std_delta_len": delta + rng.normal(0, 0.1),
            "instruction_difficulty": float(np.sin(index) * 2),
            "not_gamed_baseline": False,
            "model": model,
        }
        for model, delta in (("concise", 1.2), ("verbose", -1.1))
        for index in range(NUM_PROMPTS)
    ]
    path = tmp_path_factory.mktemp("table") / "df_gamed.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def annotations(seed, *, length_bias=0.004, ties=False, hard=False):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 400, (NUM_PROMPTS, 2))
    odds = 0.4 + length_bias * (lengths[:, 1] - lengths[:, 0]) + rng.normal(size=NUM_PROMPTS)
    preference = 1 / (1 + np.exp(-odds))
    if hard:
        preference = preference.round()
    if ties:
        preference[::5] = 0.5
        preference[1::9] = -1  # 0 in the file: a draw too
    return pd.DataFrame(
        {
            "preference": preference + 1,
            "output_1": ["x" * length for length in lengths[:, 0]],
            "output_2": ["\u00e9" * length for length in lengths[:, 1]],
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "judge",
        }
    )


def ours(frame):
    return comparisons_of(frame.to_dict("records"))


@pytest.mark.parametrize(
    "kind", [{}, {"ties": True}, {"hard": True}, {"length_bias": -0.01}, {"length_bias": 0.0}], ids=str
)
@pytest.mark.parametrize("model", sorted(GLM_NAMES))
def test_the_rate_is_alpaca_eval_s(model, kind, table_file, monkeypatch):
    monkeypatch.setattr(peer, "hf_hub_download", lambda **_: str(table_file))
    frame = annotations(len(str(kind)), **kind)
    theirs = peer.get_length_controlled_winrate(frame, glm_name=GLM_NAMES[model], save_weights_dir=None)
    fit = fit_length_control(ours(frame), model=model, table=read_difficulty_table(table_file))
    assert 100 * fit.mean == pytest.approx(theirs["length_controlled_winrate"], abs=1e-6)
    assert 100 * fit.standard_error == pytest.approx(theirs["lc_standard_error"], abs=1e-6)
    assert fit.predictions_N == pytest.approx(frame["glm_preference"].to_numpy(), abs=1e-6)


def test_annotations_without_a_verdict_are_left_out_as_theirs_are(table_file, monkeypatch):
    monkeypatch.setattr(peer, "hf_hub_download", lambda **_: str(table_file))
    monkeypatch.setattr(peer, "get_winrate", lambda _: {"win_rate": 50.0})  # it refuses them
    frame = annotations(3)
    frame.loc[[4, 9, 30], "preference"] = np.nan
    theirs = peer.get_length_controlled_winrate(
        frame, glm_name="length_controlled_v1", save_weights_dir=None, is_warn_extreme_changes=False
    )
    fit = fit_length_control(ours(frame), model="v1", table=read_difficulty_table(table_file))
    assert 100 * fit.mean == pytest.approx(theirs["length_controlled_winrate"], abs=1e-6)


def test_what_is_no_annotation_is_refused():
    row = {"output_1": "a", "output_2": "b", "preference": 1.5}
    assert comparisons_of([{**row, "preference": None}]).preference_N[0] != 0.5
    for change in ({"preference": 3}, {"preference": "2"}, {"preference": 0.5}, {"output_1": None}):
        with pytest.raises(DataError, match="annotation 2 is none of alpaca_eval's"):
            comparisons_of([row, {**row, **change}])


def test_a_judge_that_sees_length_alone_is_corrected_to_about_one_half():
    """Preferences are a function of the lengths, 0.5 where they are equal; the model's are longer throughout."""
    delta = -np.random.default_rng(0).integers(50, 250, 400)
    deviation = delta.std(ddof=1)
    preference = 1 / (1 + np.exp(2 * np.tanh(delta / deviation)))
    comparisons = Comparisons(preference_N=preference, delta_length_N=delta)
    fit = fit_length_control(comparisons, model="minimal")
    assert preference.mean() > 0.8
    assert fit.mean == pytest.approx(0.5, abs=0.03)


def test_a_refit_under_the_same_penalty_finds_the_same(table_file):
    table, comparisons = read_difficulty_table(table_file), ours(annotations(8))
    for model in GLM_NAMES:
        fit = fit_length_control(comparisons, model=model, table=table)
        again = refit_length_control(comparisons, model=model, table=table, strength=fit.strength)
        assert again == pytest.approx(fit.mean, abs=1e-3)  # both to liblinear's tolerance, from other starts


def test_scikit_learn_is_left_as_it_was_and_says_nothing(caplog, recwarn):
    import sklearn

    before = sklearn.get_config()
    with caplog.at_level(logging.WARNING):
        fit_length_control(ours(annotations(1)), model="minimal")
    assert sklearn.get_config() == before
    assert not caplog.records and not [warning for warning in recwarn if "sklearn" in str(warning.filename)]


def test_equal_lengths_and_too_few_pairs_are_refused_in_a_line():
    with pytest.raises(DataError, match="characters longer than its baseline.*--length-control none"):
        fit_length_control(Comparisons(preference_N=np.full(9, 0.6), delta_length_N=np.full(9, -3)), model="minimal")
    with pytest.raises(DataError, match="needs 5 pairs of answers, there are 4"):
        fit_length_control(Comparisons(preference_N=np.full(4, 0.6), delta_length_N=np.arange(4)), model="minimal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("a,b\n1,2\n", "no column 'preference'"),
        ("preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\nx,0,1,1,False\n", "no number"),
        ("preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n1,1,1,1,False\n", "from 0 on"),
        ("preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n", "from 0 on"),
    ],
)
def test_what_is_no_table_is_refused(text, message, tmp_path):
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_difficulty_table(path)
