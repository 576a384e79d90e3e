"""Where a run keeps what."""

from dataclasses import dataclass
from pathlib import Path

from megatron_sppo.selfplay.config import SelfPlayConfig

REPORT_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Where a run keeps what."""

    run_dir: Path

    @property
    def base(self) -> Path:
        """The start model as a Megatron checkpoint."""
        return self.run_dir / "base"

    @property
    def base_rollouts(self) -> Path:
        """Held-out answers of the start model."""
        return self.run_dir / "base_eval" / "rollouts"

    @property
    def heldout(self) -> Path:
        """Prompts of the evaluation."""
        return self.run_dir / "prompts" / "heldout.jsonl"

    def prompts(self, iteration: int) -> Path:
        """Prompts of one iteration -> path."""
        return self.run_dir / "prompts" / f"iter_{iteration}.jsonl"

    def of(self, iteration: int, name: str) -> Path:
        """`iter_T/NAME`, NAME one of rollouts, dataset, checkpoint, hf, eval -> path."""
        return self.run_dir / f"iter_{iteration}" / name

    def token_log_ratios(self, iteration: int) -> Path:
        """Log-ratio of each token of some training answers, policy against its predecessor -> path."""
        return self.of(iteration, "token_log_ratios.jsonl")

    def result(self, iteration: int) -> Path:
        """Result of an iteration's evaluation -> path."""
        return self.of(iteration, "eval") / "result.json"

    def heldout_rollouts(self, iteration: int) -> Path:
        """Held-out answers of the policy after an iteration; 0 is the start model -> path."""
        return self.base_rollouts if iteration == 0 else self.of(iteration, "eval") / "rollouts"

    def hugging_face(self, config: SelfPlayConfig, iteration: int) -> Path:
        """Hugging Face directory of the policy after an iteration, or its base; 0 is the start model -> path."""
        return config.run.model if iteration == 0 or config.swaps_adapters else self.of(iteration, "hf")

    def adapter(self, config: SelfPlayConfig, iteration: int) -> Path | None:
        """PEFT directory of the policy after an iteration -> path, or None: it is a whole model."""
        return self.of(iteration, "adapter") if config.swaps_adapters and iteration > 0 else None

    def policy(self, config: SelfPlayConfig, iteration: int) -> tuple[Path, ...]:
        """What samples as the policy after an iteration -> Hugging Face directory, and PEFT's if there is one."""
        adapter = self.adapter(config, iteration)
        return (self.hugging_face(config, iteration), *([] if adapter is None else [adapter]))

    def export(self, config: SelfPlayConfig, iteration: int) -> Path:
        """What an iteration's export writes -> path."""
        return self.adapter(config, iteration) or self.of(iteration, "hf")

    def auxiliary(self, iteration: int) -> Path:
        """Megatron checkpoint of onpo's auxiliary policy after an iteration; 0 is the start model -> path."""
        return self.base if iteration == 0 else self.of(iteration, "auxiliary")

    def checkpoint(self, iteration: int) -> Path:
        """Megatron checkpoint that an iteration's training wrote; 0 is the start model -> path."""
        return self.base if iteration == 0 else self.of(iteration, "checkpoint")

    def megatron(self, config: SelfPlayConfig, iteration: int) -> Path:
        """Megatron checkpoint of the policy after an iteration, its adapter alone, or merged -> path."""
        merges = config.run.lora_merge_each_iteration and iteration > 0
        return self.of(iteration, "merged") if merges else self.checkpoint(iteration)
