"""A judge on a pool: known without being loaded, the same everywhere or refused, its budget divided.

Workers are made in this process, from what would be sent; tests/e2e/test_cluster_scoring.py has them on a real Ray.
"""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge import workers
from megatron_sppo.judge.batches import Batch
from megatron_sppo.judge.load import identify_judge, load_judge
from megatron_sppo.judge.workers import open_judge, pooled_here
from tests.unit.judge.groups import group_of
from tests.unit.judge.test_gpm import write_model as write_preference_model
from tests.unit.judge.test_reward import write_model as write_reward_model
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

GROUPS = [group_of("why?", ["a", "bb", "c c"]), group_of("how?", ["d", "e e e"], prompt_id="q")]
TWO = PoolConfig(workers=2)


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both formats."""
    return make_tiny_pairrm(tmp_path_factory.mktemp("pairrm"))


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sppo.cluster.ray_team.cluster_has_gpus", lambda pool: False)


@pytest.mark.parametrize("settings", [{}, {"one_order": True, "preset": "official"}, {"after": "</think>"}])
@pytest.mark.parametrize("gate", [None, 0.9])
def test_a_judge_is_known_without_being_loaded(pairrm, settings: dict, gate: float | None) -> None:
    for path in pairrm:
        loaded = load_judge(f"pairrm:{path}", similarity_gate=gate, **settings)
        known = identify_judge(f"pairrm:{path}", dtype="float32", similarity_gate=gate, **settings)
        assert (known.name, known.fingerprint) == (loaded.name, loaded.fingerprint)
    assert known != identify_judge(f"pairrm:{path}", dtype="bfloat16", similarity_gate=gate, **settings)


def sent(judge: workers.PooledJudge) -> workers.JudgeWorker:
    """Make a worker of what crosses to its process."""
    return pickle.loads(pickle.dumps(judge.make_worker))()


@pytest.mark.parametrize("kind", ["reward", "gpm"])
def test_a_chat_model_is_opened_on_a_pool_without_being_loaded(
    tmp_path: Path, no_gpus: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_model = {"reward": write_reward_model, "gpm": write_preference_model}[kind]
    spec = f"{kind}:{write_model(tmp_path)}"

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the driver loads a model")

    with monkeypatch.context() as driver:
        driver.setattr("transformers.AutoModel.from_pretrained", load)
        driver.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", load)
        judge = open_judge(spec, pool=TWO)
        assert judge.here is None and judge.num_gpus == 0
        assert judge.fingerprint != identify_judge(spec, dtype="bfloat16").fingerprint
    loaded = load_judge(spec)
    assert (judge.name, judge.fingerprint) == (loaded.name, loaded.fingerprint)
    sent(judge)  # which finds the files that the driver named


@pytest.mark.parametrize("kind", ["rules", "matrices", "pairrm"])
def test_what_a_worker_judges_is_what_this_process_judges(
    pairrm, tmp_path: Path, no_gpus: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A path is typed relative to the driver's directory, and a worker has another one."""
    lines = ['{"prompt_id": "p", "judge_logits": [[0, 1, 2], [3, 0, 4], [5, 6, 0]]}']
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"prompt_id": "q", "judge_logits": [[0, 1], [2, 0]]}']))
    spec = {
        "rules": "rules:cyclic",
        "matrices": f"matrices:{tmp_path / 'm.jsonl'}",
        "pairrm": f"pairrm:{pairrm[1].name}",
    }
    monkeypatch.chdir(pairrm[1].parent)
    groups = [group_of("why?", ["a", "bb", "c c"], prompt_id="p"), GROUPS[1]]
    judge, alone = open_judge(spec[kind], pool=TWO), pooled_here(load_judge(spec[kind]))
    assert (judge.name, judge.fingerprint) == (alone.name, alone.fingerprint)
    assert (judge.here is None) == (kind == "pairrm") and judge.num_gpus == 0
    found = [list(alone.make_worker().run(iter([Batch(index=0, groups=groups)]), lambda *_: None))]
    monkeypatch.chdir(tmp_path)
    found += [list(sent(judge).run(iter([Batch(index=0, groups=groups)]), lambda *_: None))]
    for left, right in zip(*(results[0].verdicts for results in found), strict=True):
        np.testing.assert_array_equal(left, right)
    assert found[0][0].counts == found[1][0].counts


def test_a_worker_with_other_files_is_refused(pairrm, tmp_path: Path, no_gpus: None) -> None:
    path = shutil.copytree(pairrm[1], tmp_path / "copy")
    judge = open_judge(f"pairrm:{path}", pool=TWO)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config + " ")
    with pytest.raises(ConfigError, match=r"another judge than the driver's: its files differ. Copy"):
        sent(judge)


def test_a_gpu_that_torch_does_not_find_is_said(pairrm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sppo.cluster.ray_team.cluster_has_gpus", lambda pool: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    judge = open_judge(f"pairrm:{pairrm[1]}", pool=TWO)
    assert judge.num_gpus == 1
    assert judge.fingerprint == identify_judge(f"pairrm:{pairrm[1]}", dtype="bfloat16").fingerprint
    with pytest.raises(ConfigError, match="torch finds no GPU on"):
        sent(judge)


@pytest.mark.parametrize(
    ("pool", "max_requests", "expected"),
    [
        (TWO, 7, 3),
        (TWO, None, None),
        (TWO, 1, "--max-requests 1 cannot be divided among 2 workers. Use --workers 1"),
        (PoolConfig(ray="auto"), 9, "Use --workers N"),
    ],
)
def test_an_endpoint_s_budget_is_divided(pool: PoolConfig, max_requests: int | None, expected: object) -> None:
    spec = "endpoint:http://127.0.0.1:9/v1#m"
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            open_judge(spec, pool=pool, max_requests=max_requests)
        return
    judge = open_judge(spec, pool=pool, max_requests=max_requests)
    assert judge.make_worker.settings["max_requests"] == expected


def test_the_key_of_an_endpoint_goes_along_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_ENDPOINT_KEY_NAME", "MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret-words")
    judge = open_judge("endpoint:http://127.0.0.1:9/v1#m", pool=TWO)
    assert judge.make_worker.environment["MY_KEY"] == "secret-words" and "secret" not in repr(judge)
