"""The peers of figures C3 and G3, run in their own environment; `benchmarks.train_throughput` starts them.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0

Imports nothing of megatron_sppo, which that environment lacks. Commands:

    train_peers.py model DIR JSON                       random Llama and its word-level tokenizer
    torchrun train_peers.py trl|official HF PAIRS OUT JSON     one training run, a JSON file per rank

A run's file holds what `train_throughput` reads: losses; seconds of the reference pass and of each step (CPU seconds,
on a GPU wall time); real tokens of each step; on a GPU the peak of allocated memory in bytes.
"""

import copy
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# B = sequences (chosen ones, then rejected ones), S = padded length, V = vocabulary


def make_model(directory: str, settings: dict[str, Any]) -> None:
    """Write a Llama with random weights, and a tokenizer whose words w3 .. w(V-1) are its ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab_size = settings["vocab_size"]
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings, bos_token_id=1, eos_token_id=2))
    model.to(getattr(torch, settings["dtype"])).save_pretrained(directory)


def now(device: str) -> float:
    """Read the clock: this process's CPU seconds, or on a GPU the wall clock once its work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def train_trl(hf: str, pairs: list[dict[str, Any]], output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """TRL's DPOTrainer at its best: reference computed once, no padding beyond the batch, fused AdamW on a GPU.

    Lengths are grouped and Liger's kernels put in if asked; FlashAttention is taken where it is installed.
    """
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    seconds: dict[str, Any] = {"steps": [], "tokens": []}
    reference: list[float] = []
    device = settings["device"]
    on_gpu = device == "cuda"

    class Timed(DPOTrainer):
        def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
            begin = now(device)
            result = super().compute_ref_log_probs(*args, **kwargs)
            reference.append(now(device) - begin)
            return result

        def training_step(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            seconds["tokens"].append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds["begin"] = now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["steps"].append(now(device) - seconds.pop("begin"))

    config = DPOConfig(
        output_dir=output,
        loss_type="sppo_hard",
        beta=1 / settings["eta"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=settings["pairs_per_rank"],
        num_train_epochs=1,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="group_by_length" if settings["group_by_length"] else "sequential",
        length_column_name="length",
        gradient_checkpointing=False,
        remove_unused_columns=False,  # or the lengths are lost
        use_cpu=not on_gpu,
        bf16=on_gpu and not settings["float32"],
        use_liger_kernel=settings["liger"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    # A file that both ranks read: what one of them tokenises or precomputes, the other finds in the cache.
    if os.environ["RANK"] == "0":
        Path(f"{output}.jsonl").write_text("".join(json.dumps(_in_words(pair)) + "\n" for pair in pairs))
    config.distributed_state.wait_for_everyone()
    attention = "flash_attention_2" if on_gpu and importlib.util.find_spec("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation=attention)
    trainer = Timed(
        model=model,
        args=config,
        train_dataset=load_dataset("json", data_files=f"{output}.jsonl", cache_dir=f"{output}.cache", split="train"),
        processing_class=AutoTokenizer.from_pretrained(hf),
        callbacks=[Clock()],
    )
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert all(row[f"{name}_ids"] == pair[name] for name in ("prompt", "chosen", "rejected"))
    trainer.train()
    timed = reference[1:] if on_gpu else reference  # the first batch compiles kernels
    seconds["reference"] = sum(timed) * len(reference) / len(timed)
    if on_gpu:
        seconds["peak"] = torch.cuda.max_memory_allocated()
    return {"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line], **seconds}


def _in_words(pair: dict[str, Any]) -> dict[str, Any]:
    prompt, chosen, rejected = (" ".join(f"w{i}" for i in pair[name]) for name in ("prompt", "chosen", "rejected"))
    # TRL appends the end-of-sequence token itself.
    rows = {
        "prompt": prompt,
        "chosen": f" {chosen.removesuffix(' w2')}",
        "rejected": f" {rejected.removesuffix(' w2')}",
    }
    return {**rows, "length": len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))}


def train_official(hf: str, pairs: list[dict[str, Any]], output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What uclaml/SPPO computes: pairs padded to one length, log_softmax of every position, a reference model a step.

    Its loss with the hard labels of `sppo_hard`, as TRL sums it; AdamW in place of its RMSprop, as the others here.
    """
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    torch.distributed.init_process_group("gloo")
    rank, size, share = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), settings["pairs_per_rank"]
    policy = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    wrapped = DistributedDataParallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    losses, steps, num_tokens = [], [], []
    for first in range(0, len(pairs), size * share):
        begin = time.process_time()
        tokens, mask, is_response = _padded(pairs[first + rank * share : first + (rank + 1) * share])
        num_tokens.append(int(mask.sum()))
        log_prob_B = _sequence_log_probs(wrapped, tokens, mask, is_response)
        with torch.no_grad():
            reference_B = _sequence_log_probs(reference, tokens, mask, is_response)
        chosen, rejected = (log_prob_B - reference_B).chunk(2)
        loss = ((chosen - settings["eta"] / 2).square() + (rejected + settings["eta"] / 2).square()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.process_time() - begin)
        mean = loss.detach() / size
        torch.distributed.all_reduce(mean)
        losses.append(float(mean))
    torch.distributed.destroy_process_group()
    return {"losses": losses, "reference": 0.0, "steps": steps, "tokens": num_tokens}


def _padded(pairs: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay chosen, then rejected sequences side by side -> tokens, attention mask, response mask, each [B, S]."""
    rows = [(pair["prompt"], pair[name]) for name in ("chosen", "rejected") for pair in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), length), 2)
    mask, is_response = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        is_response[row, len(prompt) : end] = True
    return tokens, mask, is_response


def _sequence_log_probs(model: Any, tokens: Tensor, mask: Tensor, is_response: Tensor) -> Tensor:
    logits_BSV = model(tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    labels = tokens[:, 1:].unsqueeze(2)
    log_prob_BS = torch.gather(logits_BSV.log_softmax(-1), dim=2, index=labels).squeeze(2)
    return (log_prob_BS * is_response[:, 1:]).sum(-1)


def main() -> None:
    """Run one command and write what it found."""
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    if command == "model":
        make_model(arguments[0], json.loads(arguments[1]))
        return
    hf, data, output, settings = arguments
    pairs = [json.loads(line) for line in Path(data).read_text(encoding="ascii").splitlines()]
    train = {"trl": train_trl, "official": train_official}[command]
    result = train(hf, pairs, output, json.loads(settings))
    Path(output).mkdir(parents=True, exist_ok=True)
    Path(output, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result), encoding="ascii")


if __name__ == "__main__":
    main()
