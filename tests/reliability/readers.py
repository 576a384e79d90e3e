"""What reads a file of a stranger's, each as a function of the file's bytes: for random, mutated and guided bytes.

A reader may return anything, or raise what is documented for users. Everything else that comes out is a fault: a
traceback, a hang, memory without bounds.
"""

import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_sppo.checkpoints.adapter_file import read_adapter
from megatron_sppo.checkpoints.digests import read_digests
from megatron_sppo.checkpoints.distcp import DistcpReader
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.megatron_checkpoint import verify_checkpoint
from megatron_sppo.checkpoints.safetensors_file import read_header
from megatron_sppo.checkpoints.side_files import _check_template
from megatron_sppo.checkpoints.torch_streams import object_in
from megatron_sppo.config_text import read_yaml
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.data.indexed import Column, ColumnWriter
from megatron_sppo.data.schema import read_manifest as read_dataset_manifest
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.evaluation.players import _rows as read_answers
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.matrices import MatricesJudge
from megatron_sppo.judge.verdict import verdict_logit
from megatron_sppo.model_file import read_architecture
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling
from megatron_sppo.rollout.finished_shards import read_earlier_job
from megatron_sppo.rollout.openai_server import ServerFault
from megatron_sppo.rollout.preferences import preference_row
from megatron_sppo.rollout.prompts import Prompt, read_prompts
from megatron_sppo.rollout.records import ShardEntry, read_manifest, read_rows
from megatron_sppo.rollout.server import _responses
from megatron_sppo.rollout.server_pool import RowRefused
from megatron_sppo.rollout.tables import UnusableRow
from megatron_sppo.selfplay.stages import read_state
from megatron_sppo.selfplay.summary import read_summary
from megatron_sppo.storage import sha256_of_file
from tests.models import CHAT_TEMPLATE, llama_config

DOCUMENTED = (ConfigError, DataError, ConversionError, ServerFault, RowRefused, UnusableRow)


@dataclass(frozen=True)
class Reader:
    """One kind of file."""

    name: str
    """Of the file."""
    seed: bytes
    """A sound one."""
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = DOCUMENTED

    @property
    def content(self) -> Any:
        """The seed as JSON; None where it is none."""
        try:
            return json.loads(self.seed)
        except ValueError:
            return None

    def try_bytes(self, directory: Path, content: bytes) -> None:
        """Read these bytes as such a file; whatever is not documented comes out."""
        path = directory / self.name
        path.write_bytes(content)
        try:
            self.read(path)
        except self.errors as error:
            is_ours = isinstance(error, DOCUMENTED)
            assert not is_ours or len(str(error).splitlines()) <= 1, f"several lines: {error}"


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _index() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        column = ColumnWriter(Path(scratch, "c"), np.int32)
        column.append([[1, 2, 3], [4]])
        column.finish()
        return Path(scratch, "c.idx").read_bytes()


def _read_index(path: Path) -> Any:
    path.with_suffix(".bin").write_bytes(bytes(16))
    return Column(path.with_suffix(""), np.int32, remedy="Write it again.").sequence(0)


def _metadata() -> bytes:
    chunk = dcp.ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([2, 3]))
    tensor = dcp.TensorStorageMetadata(dcp.TensorProperties(torch.float32), torch.Size([2, 3]), [chunk])
    place = {dcp.MetadataIndex("a.weight", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 100)}
    return pickle.dumps(dcp.Metadata({"a.weight": tensor, "b": dcp.BytesStorageMetadata()}, None, place))


def _read_metadata(path: Path) -> Any:
    reader = DistcpReader.open(path.parent)
    return [reader.read(key, [0] * len(shape), shape) for key, shape in reader.shapes().items() if shape[:1] == (2,)]


def _stream() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4), "b": [1, "x"]}, buffer)
    return buffer.getvalue()


def _shard_rows(path: Path) -> list[Any]:
    content = path.read_bytes()
    entry = ShardEntry(file=path.name, rows=content.count(b"\n") + (content[-1:] not in (b"\n", b"")),
                       sha256=sha256_of_file(path))  # fmt: skip
    return list(read_rows(path.parent, entry, vocab_size=50, num_responses=1))


def _signed(path: Path) -> Any:
    """Read a dataset's manifest that somebody has signed with whatever is in it."""
    content = json.loads(path.read_bytes())
    if isinstance(content, dict):
        content.pop("manifest_sha256", None)
        path.write_text(json.dumps({**content, "manifest_sha256": sha256_of_json(content)}))
    return read_dataset_manifest(path.parent)


def _listed(path: Path) -> None:
    (path.parent / ".metadata").write_bytes(b"x")
    verify_checkpoint(path.parent)


def _reply(path: Path) -> Any:
    prompt = Prompt(prompt_id="p", messages=({"role": "user", "content": "?"},))
    sampling = Sampling(num_responses=1, temperature=1.0, top_p=1.0, max_tokens=4, seed=0, stop_token_ids=(2,))
    reply = json.loads(path.read_bytes())
    tokenized = TokenizedPrompt(prompt=prompt, text="?", token_ids=(1,))
    return _responses(reply, tokenized, sampling, None) if isinstance(reply, dict) else None


def _verdict(path: Path) -> Any:
    choice = json.loads(path.read_bytes())
    logit, _ = verdict_logit(choice) if isinstance(choice, dict) else (0.0, "")
    assert abs(logit) < 1e9
    return logit


def _config(path: Path) -> Any:
    return architecture_from_hf(read_config(path.parent), place=str(path))


def _header() -> bytes:
    fields = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}
    text = _json(fields)
    return len(text).to_bytes(8, "little") + text + bytes(16)


def _safetensors_of(path: Path) -> Any:
    """Read a header that is JSON, with its true length before it."""
    text = path.read_bytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return read_header(path)


_SHA = "0" * 64
_RATE = {"mean": 0.5, "low": 0.4, "high": 0.6, "num_prompts": 3}
_ANSWER = {"text": "b", "token_ids": [4, 2], "finish_reason": "stop", "seed": None}
_ROW = {
    "schema_version": 1, "prompt_id": "p", "messages": [{"role": "user", "content": "?"}], "prompt_token_ids": [1, 3],
    "responses": [_ANSWER], "prompt_text": "?", "columns": {"a": [1]},
}  # fmt: skip
_ARCHITECTURE = {
    "family": "llama", "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2,
    "num_query_groups": 1, "kv_channels": 4, "vocab_size": 20, "max_position_embeddings": 32,
}  # fmt: skip
_FILES = {f"{c}.{s}": {"sha256": _SHA, "bytes": 1} for c in ("tokens", "win_rates", "preferences", "judge_logits")
          for s in ("bin", "idx")} | {"prompts.jsonl": {"sha256": _SHA, "bytes": 1}}  # fmt: skip

READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", _header(), read_header),
    "safetensors header": Reader("model.safetensors", _header()[8:-16], _safetensors_of),
    ".idx": Reader("c.idx", _index(), _read_index),
    ".metadata": Reader(".metadata", _metadata(), _read_metadata),
    "torch stream": Reader(
        "x.pt",
        _stream(),
        lambda path: object_in(bytearray(path.read_bytes())),
        # Its callers word these (distcp.LOADING_ERRORS).
        (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
         OverflowError, MemoryError, AssertionError),
    ),
    "rows of rollouts": Reader("shard-00000.jsonl", _json(_ROW), _shard_rows),
    "rollouts' manifest": Reader(
        "manifest.json",
        _json({
            "schema_version": 1, "model": "m", "model_hash": _SHA, "tokenizer_hash": None, "chat_template_hash": None,
            "vocab_size": 5, "sampling": {"num_responses": 2}, "num_prompts": 1, "quarantined": [],
            "shards": [{"file": "shard-00000.jsonl", "rows": 1, "sha256": _SHA}], "outcomes": {"a": 1},
        }),
        lambda path: read_manifest(path.parent),
    ),
    "dataset's manifest": Reader(
        "manifest.json",
        _json({
            "schema_version": 1, "num_prompts": 1, "num_responses": 2, "tokenizer_hash": None, "vocab_size": 9,
            "judge": "j", "preset": "paper", "selection": "all", "files": _FILES, "rollouts_sha256": None,
            "quarantined": [{"prompt_id": "p", "reason": "r"}],
        }),
        _signed,
        (*DOCUMENTED, json.JSONDecodeError, UnicodeDecodeError, RecursionError),  # of `_signed` itself
    ),
    "checkpoint's manifest": Reader(
        "manifest.json",
        _json({"schema_version": 1, "files": {".metadata": {"sha256": _SHA, "bytes": 1, "digests": "a.digests"}}}),
        _listed,
    ),
    "digests": Reader(
        "a.digests",
        _json({"schema_version": 2, "bytes": 3, "items": [[0, 3, _SHA]]}),
        lambda path: read_digests(path).check_file(path),
    ),
    "model.json": Reader(
        "model.json",
        _json({"schema_version": 1, "architecture": _ARCHITECTURE, "tokenizer": {"hash": None, "files": []}}),
        lambda path: read_architecture(path.parent),
    ),
    "adapter.json": Reader(
        "adapter.json",
        _json({
            "schema_version": 1, "rank": 4, "alpha": 8.0, "scaling": "lora", "targets": ["q_proj"],
            "base": {"weights_hash": "0" * 12, "params_dtype": "float32"},
        }),
        lambda path: read_adapter(path.parent),
    ),
    "config.json": Reader("config.json", _json(llama_config()), _config),
    "YAML": Reader("c.yaml", b"rollout: {num_responses: 5, stop: [a, b]}\ntraining:\n  lr: 5e-7\n", read_yaml),
    "request.json": Reader(
        "request.json",
        _json({
            "request": {"shard_size": 3},
            "shards": {"0": {"entry": {"file": "shard-00000.jsonl", "rows": 1, "sha256": _SHA}, "outcomes": {}}},
        }),
        lambda path: read_earlier_job(path.parent),
    ),
    "state.json": Reader(
        "state.json",
        _json({"schema_version": 1, "finished": False, "stages": {"a": {"status": "done", "command": ["x"]}}}),
        lambda path: read_state(path.parent),
    ),
    "summary.json": Reader(
        "summary.json",
        _json({"iterations": [{
            "iteration": 1, "judge": "j", "win_rate_vs_base": _RATE, "win_rate_vs_previous": None,
            "mean_response_tokens": 2.5, "seconds": {"train": 1.0},
        }]}),
        lambda path: read_summary(path.parent),
    ),
    "prompts": Reader("p.jsonl", _json({"prompt_id": "a", "messages": _ROW["messages"], "split": "train"}),
                      lambda path: read_prompts(path)),
    "preferences": Reader(
        "p.json",
        _json({"prompt": "Why?", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 0.5}),
        lambda path: preference_row(json.loads(path.read_bytes())),
        (*DOCUMENTED, json.JSONDecodeError, UnicodeDecodeError, RecursionError),
    ),
    "matrices": Reader(
        "m.jsonl",
        _json({"prompt_id": "p", "judge_logits": [[0, 1.5], [-1.5, None]]}),
        lambda path: MatricesJudge(str(path), rule="paper"),
    ),
    "answers": Reader("a.jsonl", _json({"instruction": "?", "output": "b", "prompt_id": "p"}), read_answers),
    "chat template": Reader(
        "t.jinja", CHAT_TEMPLATE.encode(), lambda path: _check_template(path.read_text(encoding="utf-8")), (ValueError,)
    ),
    "server's reply": Reader(
        "r.json",
        _json({"choices": [{"index": 0, "text": "b", "token_ids": [4, 2], "finish_reason": "stop",
                            "prompt_token_ids": [1]}]}),
        _reply,
        (*DOCUMENTED, json.JSONDecodeError, UnicodeDecodeError, RecursionError),  # of `_reply` itself
    ),
    "judge's answer": Reader(
        "r.json",
        _json({"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": [
            {"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}]}]}}),
        _verdict,
        (*DOCUMENTED, json.JSONDecodeError, UnicodeDecodeError, RecursionError),
    ),
}  # fmt: skip


def json_readers() -> Iterator[str]:
    """Name the readers whose files are JSON."""
    return (name for name, reader in READERS.items() if isinstance(reader.content, dict))
