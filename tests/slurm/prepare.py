"""Write a tiny model, settings and prompts for tests/slurm/run.sh, under the directory that is given."""

import json
import sys
from pathlib import Path

from tests.models import tiny_llama

CONFIG = """
run: {iterations: 2, prompts_per_iteration: all}
rollout:
  num_responses: 2
  max_tokens: 24
  rollout_options: {max_model_len: 256, shard_size: 8, enforce_eager: true}
scoring: {judge: rules:concise, allow_no_signal: true}
evaluation: {heldout_prompts: 4, eval_num_responses: 1, inspected_prompts: 2}
training:
  eta: 10
  lr: 1.0e-4
  lr_decay_style: constant
  params_dtype: float32
  micro_batch_size: 2
  global_batch_size: 4
  save_interval: 4
tracking: {tracker: [tensorboard, mlflow], tracker_offline: true}
"""


def main(directory: Path) -> None:
    tiny_llama(directory / "model", head_dim=64, num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16")
    (directory / "run.yaml").write_text(CONFIG)
    topics = ("a river", "the moon", "old bread", "a train", "winter", "a key", "the sea", "a lamp")
    with open(directory / "prompts.jsonl", "w") as file:
        for number in range(40):
            prompt = f"Say {number % 5 + 1} things of {topics[number // 5]}."
            file.write(json.dumps({"prompt_id": f"p{number}", "prompt": prompt}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
