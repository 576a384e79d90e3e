"""Proves that tools/plan.py plans every config of examples/, and that what it prints adds up."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, run_here, run_process


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here("tools/plan.py", *arguments)


def config(name: str) -> str:
    return str(REPOSITORY / "examples/configs" / name)


def test_llama_3_70b_is_planned_for_32_64_and_512_gpus() -> None:
    done = plan("--config", config("llama3_70b_h100.yaml"), "--world-size", "32", "64", "512", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["num_parameters"] == 70_553_706_496
    assert [p["world_size"] for p in report["plans"]] == [32, 64, 512]
    for p in report["plans"]:
        assert p["fits"] is True
        stages = p["memory_bytes"]
        # Eight tensor-parallel ranks hold a stage: together they hold the model, padded vocabulary and norms' copies.
        assert 8 * sum(stage["num_parameters"] for stage in stages) == pytest.approx(70_553_706_496, rel=1e-3)
        for stage in stages:
            parts = ("weights", "gradients", "optimizer", "fp8_weights", "activations", "working", "allowance")
            assert stage["total"] == sum(stage[part] for part in parts)
        assert p["step"]["seconds"] > p["step"]["compute_seconds"]
    ranks_of_a_share = [stages[0]["optimizer"] for stages in (p["memory_bytes"] for p in report["plans"])]
    assert ranks_of_a_share[0] == pytest.approx(16 * ranks_of_a_share[2], rel=1e-3)  # DP1 and DP16
    assert any("idle" in line for line in report["plans"][2]["advice"])
    # RMSprop: 16 saves of 5 x 141.1 GB by four nodes at 2 GB/s, a rank's 22.71 GB copied at 20 GB/s and hashed twice by
    # 8 threads at 1.4: 25 minutes, more than half of the training.
    save = 22.71 / 20 + 2 * 22.71 / (8 * 1.4) + 5 * 141.1 / 8
    assert report["plans"][0]["iteration_seconds"]["saving checkpoints"] == pytest.approx(16 * save, rel=1e-3)
    for p in report["plans"]:
        waited = {row["what"]: row["waited_seconds"] for row in p["files"]["passages"]}
        assert set(waited) == {
            *("saving checkpoints", "loading checkpoints", "export", "hashing the export", "hand-over to the engine")
        }
        assert waited.items() <= p["iteration_seconds"].items()
        # Three iterations of 16 checkpoints and an export, and the start model.
        assert p["files"]["peak_disk_bytes"] == (2 + 3 * (16 * 10 + 2)) * 70_553_706_496
    assert any("--save-interval" in line for line in report["plans"][0]["advice"])


@pytest.mark.parametrize(
    ("name", "model"),
    [("mistral_7b_paper.yaml", None), ("llama3_8b_official.yaml", None), ("smollm2_demo.yaml", "smollm2-135m")],
)
def test_self_play_configs_are_planned_too(name: str, model: str | None) -> None:
    done = plan("--config", config(name), *(("--model", model) if model else ()))
    assert done.returncode == 0, done.stderr
    assert "fits in 80 GB" in done.stdout and "tokens/s a GPU" in done.stdout


def test_the_rates_of_files_and_what_is_kept_are_flags() -> None:
    flags = ("--storage-gb-per-s", "1", "--keep-iterations", "1", "--keep-last", "1", "--world-size", "32")
    done = plan("--config", config("llama3_70b_h100.yaml"), *flags, "--json")
    assert done.returncode == 0, done.stderr
    (planned,) = json.loads(done.stdout)["plans"]
    save = 22.71 / 20 + 2 * 22.71 / (8 * 1.4) + 5 * 141.1 / 4
    assert planned["iteration_seconds"]["saving checkpoints"] == pytest.approx(16 * save, rel=1e-3)
    assert planned["files"]["peak_disk_bytes"] == (2 + 12 + 20) * 70_553_706_496


def test_a_model_s_own_config_json_is_enough(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    done = run_process("tools/plan.py", "--model", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    # 2 layers of 2 norms, q and o 64 x 64, k and v 64 x 32, three of 64 x 96; embedding and output of 259; last norm.
    layer = 2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    assert json.loads(done.stdout)["num_parameters"] == 2 * layer + 2 * 259 * 64 + 64


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    done = plan("--config", config("llama3_70b_h100.yaml"), "--world-size", "48", "20")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("plan.py: error: 48 ranks cannot be divided")


@pytest.mark.parametrize("section", ["run: 5", "rollout: [a]", "scoring: x"])
def test_a_section_of_a_self_play_config_that_is_none_is_one_line(section: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(f"training: {{lr: 1e-6}}\n{section}\n", encoding="utf-8")
    done = plan("--config", str(file), "--model", "llama3-8b")
    assert done.returncode == 2
    assert f"{section.partition(':')[0]} is a section and holds" in done.stderr.splitlines()[-1]
