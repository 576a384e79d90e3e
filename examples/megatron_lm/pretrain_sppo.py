"""SPPO through Megatron-LM's own `pretrain()`, by its own flags: for those who have Megatron-LM recipes already.

    torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_sppo.py \
        --preference-data datasets/iteration_t --eta 1000 \
        --pretrained-checkpoint checkpoints/pi_t --load checkpoints/pi_t_plus_1 --save checkpoints/pi_t_plus_1 \
        --lr 5e-7 --global-batch-size 64 ...          and all flags of the model, its layout and its precision

Loop, optimizer, schedule, layouts and checkpoints are Megatron-LM's; the dataset, the head, the loss and the cache of
log pi_t are ours. The same command again resumes. Needs megatron-core >= 0.19, whose wheel has megatron.training.
docs/from-megatron-lm.md says which flag is which of examples/pretrain_sppo.py.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core.datasets.utils
import numpy as np
import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from torch import Tensor

from megatron_sppo.command_line import run
from megatron_sppo.data import reference_file
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import collate
from megatron_sppo.data.selection import TrainingIndex, row_targets, training_index
from megatron_sppo.data.steps import epoch_rows
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.objective import linear_log_probs, sequence_sums, sppo_loss
from megatron_sppo.training import parallel
from megatron_sppo.training.policy import weights_hash

# B = responses of a micro-batch, S = tokens (padded to --seq-length), R = response tokens, H = hidden size

Batch = dict[str, Tensor]

IGNORED_LABEL = -100
"""Of a position that predicts no response token."""

stages: list[GPTModel] = []
"""What `build_stage` built: pretrain() shows the model to no one between loading and training."""


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron-LM's, and change the defaults that would be wrong for SPPO."""
    group = parser.add_argument_group("sppo")
    group.add_argument("--preference-data", type=Path, required=True, help="dataset of tools/score_pairrm.py")
    group.add_argument("--eta", type=float, required=True, help="nats per unit of preference; published runs use 1000")
    group.add_argument("--selection", help="responses of a prompt: all, extremes, top-bottom:M; unset: as scored")
    group.add_argument("--reference", type=Path, help="where log pi_t is kept; unset: under --save")
    # Gradients become the mean over the responses of a global batch: they are the "tokens" that Megatron-LM counts.
    parser.set_defaults(calculate_per_token_loss=True)
    # Reference and policy are the same network, or the log-ratio is not zero before the first step.
    parser.set_defaults(hidden_dropout=0.0, attention_dropout=0.0)
    parser.set_defaults(eval_iters=0, eval_interval=1 << 30)  # there is no validation set
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of Megatron-LM under which this script would be wrong, most of them silently."""
    noise = "the log-ratio of two dropped-out networks is noise"
    unseen = "the head reads the output weight without calling its layer, so that this"
    router = "its loss would be divided by responses, not by tokens"
    refused = {
        "hidden_dropout": noise,
        "attention_dropout": noise,
        "overlap_param_gather": f"{unseen} would gather it too late",
        "use_megatron_fsdp": f"{unseen} would leave it sharded",
        "use_torch_fsdp2": f"{unseen} would leave it sharded",
        "defer_embedding_wgrad_compute": f"{unseen} would find nothing deferred",
        "use_mup": f"{unseen} would not scale its logits",
        "mtp_num_layers": "heads for further tokens have no preference to learn from",
        "moe_aux_loss_coeff": router,
        "moe_z_loss_coeff": router,
    }
    for name, reason in refused.items():
        value = getattr(args, name, None)
        if any(value) if isinstance(value, list) else value:
            raise ConfigError(f"{name} is {value}: {reason}. Leave --{name.replace('_', '-')} out, or set it to 0.")
    if args.save is None:
        raise ConfigError("log pi_t and the checkpoints need a place. Use --save DIR.")
    if args.dataloader_type != "single":
        raise ConfigError("the dataset shuffles by itself. Leave --dataloader-type out.")


def build_stage(pre_process: bool, post_process: bool, vp_stage: int | None = None, **_: Any) -> GPTModel:
    """Build a pipeline stage, as any recipe does: nothing here knows of SPPO."""
    args = get_args()
    if args.transformer_impl == "local":
        spec = get_gpt_layer_local_spec(
            args.num_experts, args.moe_grouped_gemm, args.qk_layernorm, normalization=args.normalization
        )
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(args.num_experts, args.moe_grouped_gemm, args.qk_layernorm)
    model = GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        vp_stage=vp_stage,
    )
    stages.append(model)
    return model


class Responses(torch.utils.data.Dataset):
    """Responses in the order of training, each padded to --seq-length, with its win rate and its log pi_t."""

    def __init__(
        self, dataset: PreferenceDataset, index: TrainingIndex, num_samples: int, reference_GK: np.ndarray
    ) -> None:
        args = get_args()
        self._collate = partial(collate, dataset, index, packed=False, length=args.seq_length)
        self._targets, self._reference_GK = row_targets(dataset, index, eta=args.eta), reference_GK
        self._index, self._num_samples, self._seed = index, num_samples, args.seed
        self._epoch, self._order = -1, np.empty(0)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, self._index.num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_rows(self._index, seed=self._seed, epoch=epoch, by_prompt=False)
        rows = self._order[place : place + 1]
        batch = self._collate(rows, targets=self._targets.of(torch.from_numpy(rows)))
        labels = torch.full_like(batch.tokens[0], IGNORED_LABEL)
        labels[batch.response_rows] = batch.labels_R
        group, response = int(self._index.group[rows[0]]), int(self._index.response[rows[0]])
        return {
            "tokens": batch.tokens[0],
            "position_ids": batch.position_ids[0],
            "labels": labels,
            "win_rate": batch.targets.win_rate[0],
            "reference_log_prob": torch.tensor(self._reference_GK[group, response]),
            "group": torch.tensor(group),
            "response": torch.tensor(response),
            "epoch": torch.tensor(epoch),
        }


def build_datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Responses, None, None]:
    """Provide the training set, with log pi_t computed if it is not there yet; by now the weights are loaded."""
    args = get_args()
    dataset = PreferenceDataset(args.preference_data, verify_contents=parallel.is_rank_zero())
    selection = args.selection or str(dataset.manifest.selection)
    index = training_index(dataset, selection, pairs=False, seq_length=args.seq_length)
    print_rank_0(
        f"{index.num_rows} responses of {dataset.num_groups} prompts ({selection}); left out: {index.num_dropped_ties} "
        f"tied prompts, {index.num_too_long} responses of more than {args.seq_length} tokens"
    )
    if (dataset.manifest.vocab_size or 0) > vocab_size():
        raise DataError(
            f"{args.preference_data} has a vocabulary of {dataset.manifest.vocab_size} tokens, the model one of "
            f"{vocab_size()}. Generate and score rollouts with this model."
        )
    return Responses(dataset, index, num_samples[0], reference_log_probs(dataset, index, selection)), None, None


# Every rank reads its own share; nothing is broadcast.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Run a stage on the next micro-batch -> its output, and the loss of what the last stage returns."""
    batch = to_rank(next(batches))
    output = model(batch["tokens"], batch["position_ids"], None, output_processor=head, output_processor_context=batch)
    return output, partial(loss, batch)


def to_rank(batch: Batch) -> Batch:
    """Keep this context-parallel rank's tokens and find the response tokens among them -> a batch on the GPU."""
    part = {name: batch.pop(name) for name in ("tokens", "position_ids", "labels")}
    part = get_batch_on_this_cp_rank(part, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    labels_SB = part["labels"].T.reshape(-1)  # hidden states lie as [S, B, H]
    rows_R = (labels_SB != IGNORED_LABEL).nonzero()[:, 0]
    batch |= part | {"rows_R": rows_R, "labels_R": labels_SB[rows_R]}
    return {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}


def head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, context: Batch, **_: Any
) -> Tensor:
    """Take the place of logits and cross-entropy on the last stage -> log pi of each response token, [R] float32."""
    if config.sequence_parallel:
        # The head returns the whole gradient of its rows, so the gather's backward only splits.
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    return linear_log_probs(
        hidden_states.flatten(0, 1)[context["rows_R"]],
        output_layer.weight if output_weight is None else output_weight,
        context["labels_R"],
        tp_group=mpu.get_tensor_model_parallel_group(),
        vocab_size=vocab_size(),
    )


def vocab_size() -> int:
    """Count the columns of the softmax: --vocab-size, or without it the padded ones, as in Megatron-LM's own loss."""
    return get_args().vocab_size or get_args().padded_vocab_size


def sequence_log_probs(batch: Batch, token_log_prob_R: Tensor) -> Tensor:
    """Sum over each response's tokens, of all context-parallel ranks -> log pi(y|x), [B] float32, nats."""
    num_sequences = len(batch["win_rate"])
    partial_B = sequence_sums(token_log_prob_R, batch["rows_R"] % num_sequences, num_sequences)
    return parallel.sum_over_context(partial_B).float()


def loss(batch: Batch, token_log_prob_R: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Evaluate (log pi_theta / pi_t - eta (w - 1/2))^2 -> its sum, how many responses it is of, what is logged."""
    log_ratio_B = sequence_log_probs(batch, token_log_prob_R) - batch["reference_log_prob"]
    loss_B = sppo_loss(log_ratio_B, batch["win_rate"], eta=get_args().eta)
    count = torch.tensor(len(loss_B), dtype=torch.int, device=loss_B.device)
    # Context-parallel ranks compute the same terms, each with the gradient of its own tokens: count them once.
    counted = count if parallel.context_parallel_rank() == 0 else torch.zeros_like(count)
    logged = {"sppo loss": loss_B, "log-ratio": log_ratio_B.abs()}
    return loss_B.sum(), counted, {name: torch.stack([term.detach().sum(), count]) for name, term in logged.items()}


def reference_log_probs(dataset: PreferenceDataset, index: TrainingIndex, selection: str) -> np.ndarray:
    """Read log pi_t of every response, or compute it by the very micro-batches of training -> [G, K] float32, nats.

    A run that goes on cannot compute it again, for the policy has moved. Collective.
    """
    args = get_args()
    directory = args.reference or Path(args.save)
    manifest = directory / reference_file.MANIFEST_NAME
    goes_on = args.iteration > 0
    if goes_on and not manifest.is_file():
        raise DataError(
            f"{manifest} is missing, which this run was trained against. Restore it; if --load is pi_t, name that by "
            "--pretrained-checkpoint and give --load another directory."
        )
    fingerprint = {
        "weights_hash": read_json(manifest)["fingerprint"]["weights_hash"] if goes_on else weights_hash(stages),
        "dataset_hash": dataset.dataset_hash,
        "selection": selection,
        "seq_length": args.seq_length,
        "params_dtype": str(args.params_dtype),
        "transformer_impl": args.transformer_impl,
        "fp8": args.fp8,
        "fp8_recipe": args.fp8_recipe if args.fp8 else None,
    }
    stored = reference_file.read_reference(directory, fingerprint)
    torch.distributed.barrier()  # every rank has looked before one writes
    if stored is None:
        print_rank_0(f"computing log pi_t of {index.num_rows} responses ...")
        stored = compute_reference(dataset, index)
        if parallel.is_rank_zero():
            reference_file.write_reference(directory, stored, fingerprint)
        torch.distributed.barrier()
    return stored


@torch.no_grad()
def compute_reference(dataset: PreferenceDataset, index: TrainingIndex) -> np.ndarray:
    """Run an epoch forward, in its order -> [G, K] float32; NaN where no response is selected. Collective."""
    args = get_args()
    whole = args.micro_batch_size * parallel.data_parallel_size()
    # Filled up from the next epoch: the interleaved schedule wants micro-batches in multiples of the stages.
    multiple = whole * args.pipeline_model_parallel_size
    num_samples = -(-index.num_rows // multiple) * multiple
    values_GK = np.full((dataset.num_groups, dataset.num_responses), np.nan, np.float32)
    samples = Responses(dataset, index, num_samples, values_GK)
    reports = get_forward_backward_func()(
        forward_step_func=reference_step,
        data_iterator=[iter(build_pretraining_data_loader(samples, 0)) for _ in stages],
        model=stages,
        num_microbatches=num_samples // whole,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.seq_length,
        forward_only=True,
    )
    found_GK = torch.full(values_GK.shape, -torch.inf, device="cuda")
    for report in reports:
        first = report["epoch"] == 0
        found_GK[report["group"][first], report["response"][first]] = report["log_prob"][first]
    torch.distributed.all_reduce(found_GK, op=torch.distributed.ReduceOp.MAX)
    return found_GK.masked_fill(found_GK.isinf(), torch.nan).cpu().numpy()


def reference_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Do `forward_step` with log pi in place of the loss."""
    output, loss_of = forward_step(batches, model)
    batch = loss_of.args[0]

    def report(token_log_prob_R: Tensor) -> tuple[Tensor, Tensor, Batch]:
        log_prob_B = sequence_log_probs(batch, token_log_prob_R)
        found = {name: batch[name] for name in ("group", "response", "epoch")} | {"log_prob": log_prob_B}
        return log_prob_B.sum(), log_prob_B.new_ones((), dtype=torch.int), found

    return output, report


def main() -> None:
    args = parse_and_validate_args(add_flags)
    check_flags(args)
    # Our dataset needs no index builder, and the wheel has no Makefile to compile it with (megatron-core 0.19.2).
    megatron.core.datasets.utils.compile_helpers = lambda: None
    pretrain(
        pretrain_cfg_container_from_args(args),
        build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=build_stage,
    )


if __name__ == "__main__":
    run(main, name="pretrain_sppo.py")
