"""Length-controlled win rate: AlpacaEval 2's regression, in scikit-learn alone.

P(answer beats baseline) = sigmoid(a tanh(d / std d) + b difficulty + c), d = length of the baseline's answer less that
of the model's, in characters; the rate is the mean prediction where d is 0 (Dubois et al. 2024, arXiv:2404.04475).

The numbers are alpaca_eval 0.6.6's (metrics/glm_winrate.py), quirks included: no intercept but a column of ones, an L1
penalty on it too, its strength by 5-fold cross-validation over ten values, liblinear with seed 123, the regularisation
to two answer sets that were made to game the metric where their table is given. What liblinear finds is as exact as its
tolerance of 1e-4, so that another solver would give other digits.

N = annotations (pairs of answers), T = rows of the table, F = features
"""

import csv
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_sppo.errors import ConfigError, DataError

LengthModel = Literal["minimal", "noreg", "v1"]
GLM_NAMES = {
    "minimal": "length_controlled_minimal",
    "noreg": "length_controlled_noreg",
    "v1": "length_controlled_v1",
}
"""alpaca_eval's names."""
_GAMED_LAMBDA = 0.2
_NUM_FOLDS = 5
_SEED = 123
TABLE_REMEDY = (
    "Use --length-control minimal, or fetch df_gamed.csv of the dataset tatsu-lab/alpaca_eval and give "
    "--difficulty-table FILE."
)


@dataclass(frozen=True, kw_only=True)
class DifficultyTable:
    """AlpacaEval's df_gamed.csv: what the difficulty of its prompts is, and how two gamed answer sets fared on them."""

    difficulty: np.ndarray
    """[prompts], by the prompt's place in AlpacaEval's set."""
    std_delta_len_T: np.ndarray
    preference_T: np.ndarray
    """In [0, 1]; NaN where there is none."""
    difficulty_T: np.ndarray
    is_plain_T: np.ndarray
    """Whether the row is of an answer set that is not gamed."""


@dataclass(frozen=True, kw_only=True)
class LengthFit:
    """What the regression finds of one model against one baseline."""

    mean: float
    """Length-controlled win rate, in [0, 1]."""
    standard_error: float
    """Of the predictions, as alpaca_eval gives it; 0 where difficulty is no feature: all predictions are one."""
    predictions_N: np.ndarray
    weights: dict[str, float]
    strength: float
    """Inverse of the L1 penalty that cross-validation chose."""
    has_converged: bool
    """liblinear found its optimum at every penalty; where it did not, mistrust the number."""


def require_scikit_learn() -> None:
    """Refuse to start without the library.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the length-controlled win rate needs scikit-learn, which is not installed. "
            "Use --length-control none, or: pip install 'megatron-sppo[evaluation]'"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Annotations of one model against one baseline."""

    preference_N: np.ndarray
    """P(model's answer > baseline's), in [0, 1]; NaN where the judge has none."""
    delta_length_N: np.ndarray
    """Characters of the baseline's answer less those of the model's."""
    index_N: np.ndarray | None = None
    """Each annotation's row of the table's difficulties, for noreg and v1."""

    def take(self, rows: np.ndarray) -> "Comparisons":
        """Take some annotations, again and again if need be -> Comparisons."""
        index_N = None if self.index_N is None else self.index_N[rows]
        return Comparisons(
            preference_N=self.preference_N[rows], delta_length_N=self.delta_length_N[rows], index_N=index_N
        )


def comparisons_of(annotations: Sequence[Mapping[str, Any]]) -> Comparisons:
    """Take alpaca_eval's annotations of one model (output_2) against one baseline (output_1) -> Comparisons, in order.

    A preference is in [1, 2], 2 where the model wins; 0 is a draw, as 1.5, and None no verdict.

    Raises:
        DataError: a row without both outputs, or whose preference is none of these.
    """
    preference = []
    for number, row in enumerate(annotations, start=1):
        value = row.get("preference")
        is_number = isinstance(value, (int, float)) and (np.isnan(value) or value == 0 or 1 <= value <= 2)
        if not (value is None or is_number) or not all(
            isinstance(row.get(key), str) for key in ("output_1", "output_2")
        ):
            raise DataError(
                f"annotation {number} is none of alpaca_eval's: output_1 and output_2 are texts, preference one in "
                f"[1, 2], 0 or null, and here {value!r}. Give its annotations.json."
            )
        preference.append(np.nan if value is None else 0.5 if value == 0 else value - 1)
    return Comparisons(
        preference_N=np.array(preference, dtype=np.float64),
        delta_length_N=np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations]),
        index_N=np.arange(len(annotations)),
    )


class _Design(NamedTuple):
    """The rows of the regression: what is fitted, and the annotations at equal lengths."""

    features: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None
    at_equal: np.ndarray


def fit_length_control(
    comparisons: Comparisons, *, model: LengthModel, table: DifficultyTable | None = None
) -> LengthFit:
    """Fit the regression, its penalty by cross-validation, and predict at equal lengths -> LengthFit.

    Args:
        model: features and regularisation: alpaca_eval's length_controlled_minimal, _noreg or _v1.
        table: of the prompts' difficulties, for noreg and v1.

    Raises:
        DataError: fewer annotations than folds, or all answers equally much longer than the baseline's.
    """
    if (num_known := int((~np.isnan(comparisons.preference_N)).sum())) < _NUM_FOLDS:
        raise DataError(
            f"the length-controlled win rate needs {_NUM_FOLDS} pairs of answers, there are {num_known}. "
            "Use --length-control none, or more prompts."
        )
    design = _design(comparisons, model=model, table=table)
    if design is None:
        raise DataError(
            f"every answer is {int(-comparisons.delta_length_N[0])} characters longer than its baseline: length cannot "
            "be told from the win rate. Use --length-control none."
        )
    fitted, has_converged = _converged(lambda: _cross_validated(design))
    predictions = fitted.predict_proba(design.at_equal)[:, 1]
    names = ("length", "one") if model == "minimal" else ("length", "difficulty", "one")
    return LengthFit(
        mean=float(predictions.mean()),
        standard_error=float(predictions.std(ddof=1) / np.sqrt(len(predictions))),
        predictions_N=predictions,
        weights={name: float(value) for name, value in zip(names, fitted.coef_[0], strict=True)},
        strength=float(fitted.C_),
        has_converged=has_converged,
    )


def refit_length_control(
    comparisons: Comparisons, *, model: LengthModel, table: DifficultyTable | None = None, strength: float
) -> float:
    """Fit the regression to other annotations under a penalty that is known, for an interval -> win rate.

    NaN where all lengths differ by the same.
    """
    from sklearn.linear_model import LogisticRegression

    design = _design(comparisons, model=model, table=table)
    if design is None:
        return float("nan")
    probability = _twice(design.target, 1 - design.target)
    weight = probability if design.weight is None else probability * _twice(design.weight, design.weight)
    features, labels = _twice(design.features, design.features), _labels(len(design.features))
    model_of = LogisticRegression(C=strength, l1_ratio=1.0, **_settings())
    fitted, _ = _converged(lambda: model_of.fit(features, labels, sample_weight=weight))
    return float(fitted.predict_proba(design.at_equal)[:, 1].mean())


def _design(comparisons: Comparisons, *, model: LengthModel, table: DifficultyTable | None) -> _Design | None:
    """Lay out the regression -> _Design, or None where lengths do not vary."""
    deviation = float(np.std(comparisons.delta_length_N, ddof=1))
    if not deviation > 0:
        return None
    std_delta_len = comparisons.delta_length_N / deviation
    difficulty = None if model == "minimal" else _difficulty_of(table, comparisons.index_N)
    features = _features(std_delta_len, difficulty, np.ones(len(std_delta_len)))
    target, weight, at_equal = comparisons.preference_N, None, features.copy()
    at_equal[:, 0] = 0.0
    if model == "v1":
        assert table is not None
        gamed = _features(table.std_delta_len_T, table.difficulty_T, table.is_plain_T.astype(float))
        is_plain = np.concatenate([table.is_plain_T, np.ones(len(features), dtype=bool)])
        features, target = np.concatenate([gamed, features]), np.concatenate([table.preference_T, target])
        # Halved for there are two gamed sets.
        weight = is_plain.astype(float) + (_GAMED_LAMBDA * ~is_plain) / 2
    is_known = ~np.isnan(target)
    return _Design(features[is_known], target[is_known], None if weight is None else weight[is_known], at_equal)


def _features(std_delta_len: np.ndarray, difficulty: np.ndarray | None, one: np.ndarray) -> np.ndarray:
    columns = [np.tanh(std_delta_len), *([] if difficulty is None else [difficulty]), one]
    return np.stack(columns, axis=1)


def _difficulty_of(table: DifficultyTable | None, index_N: np.ndarray | None) -> np.ndarray:
    assert table is not None and index_N is not None, "noreg and v1 read a table"
    return table.difficulty[index_N]


def _twice(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.concatenate([first, second])


def _labels(number: int) -> np.ndarray:
    return _twice(np.ones(number, dtype=int), np.zeros(number, dtype=int))


def _converged(fit: Callable[[], Any]) -> tuple[Any, bool]:
    """Fit -> what is fitted, and whether liblinear said of no step that it did not converge."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fitted = fit()
    return fitted, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def is_extreme(win_rate: float, controlled: float) -> bool:
    """Apply alpaca_eval's rule of thumb for a regression that has failed: far from the plain rate -> bool.

    By more than 10 points, and by more than a quarter of what lies between the plain rate and 0, or 1.
    """
    too_small = controlled < min(win_rate * 0.75, win_rate - 0.1)
    return too_small or controlled > max(win_rate + (1 - win_rate) / 4, win_rate + 0.1)


def _settings() -> dict[str, Any]:
    return {"random_state": _SEED, "solver": "liblinear", "fit_intercept": False}


def _cross_validated(design: _Design) -> Any:
    """Fit with soft targets: each row once as a win of weight p, once as a loss of weight 1 - p -> the fitted model."""
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    number, probability = len(design.features), _twice(design.target, 1 - design.target)
    weight = None if design.weight is None else _twice(design.weight, design.weight)
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            l1_ratios=(1.0,),
            cv=GroupKFold(n_splits=_NUM_FOLDS),
            scoring=scorer.set_score_request(true_sample_weight=True, true_prob=True),
            use_legacy_attributes=False,
            **_settings(),
        ).set_fit_request(sample_weight=True)
        model.fit(
            _twice(design.features, design.features),
            _labels(number),
            sample_weight=probability if weight is None else probability * weight,
            groups=_twice(np.arange(number), np.arange(number)),
            true_sample_weight=weight,
            true_prob=probability,
        )
    return model


def _log_loss(
    y_true: np.ndarray, y_pred: np.ndarray, true_prob: np.ndarray, true_sample_weight: np.ndarray | None = None
) -> float:
    """Log loss against soft targets, as alpaca_eval's scorer has it -> nats."""
    target = np.where(y_true == 1, true_prob, 1 - true_prob)
    predicted = np.clip(y_pred, 1e-15, 1 - 1e-15)
    losses = target * np.log(predicted) + (1 - target) * np.log(1 - predicted)
    return float(-np.mean(losses if true_sample_weight is None else losses * true_sample_weight))


def read_difficulty_table(path: Path) -> DifficultyTable:
    """Read df_gamed.csv -> DifficultyTable.

    Raises:
        DataError: no such file, or a column or number that it must have is missing.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. {TABLE_REMEDY}")
    wanted = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path} has no column {missing[0]!r}: it is not AlpacaEval's df_gamed.csv. {TABLE_REMEDY}")
        rows = list(reader)
    try:
        number = {
            name: np.array([float(row[name]) if row[name] != "" else np.nan for row in rows])
            for name in ("preference", "std_delta_len", "instruction_difficulty")
        }
        indices = [int(float(row["index"])) for row in rows]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} holds what is no number ({error}). {TABLE_REMEDY}") from None
    first = {index: row for row, index in reversed(list(enumerate(indices)))}
    if not first or sorted(first) != list(range(len(first))):
        raise DataError(f"{path} does not have every prompt from 0 on. {TABLE_REMEDY}")
    return DifficultyTable(
        difficulty=number["instruction_difficulty"][[first[index] for index in range(len(first))]],
        std_delta_len_T=number["std_delta_len"],
        preference_T=number["preference"],
        difficulty_T=number["instruction_difficulty"],
        is_plain_T=np.array([row["not_gamed_baseline"].strip().lower() == "true" for row in rows]),
    )
