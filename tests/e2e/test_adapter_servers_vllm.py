"""Proves: a real vLLM server on the CPU stays up while adapters are changed in it, each answer is `peft`'s with the
adapter that was asked for, and a server that goes on with the adapter before is refused before a token is sampled.

The lie is a proxy's, which has the real server load the files of the adapter before under the new adapter's name: to
that the server agrees, lists it and answers. How fakes lie is in tests/unit/rollout/test_adapter_hand_over.py.
"""

import http.server
import importlib.util
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)
pytest.importorskip("peft")

import peft
import torch
import transformers

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.config import GenerateConfig, ServerConfig
from megatron_sppo.rollout.generate import generate_rollouts
from megatron_sppo.rollout.records import read_rollouts
from tests.adapters import DENSE_TARGETS, random_adapter
from tests.models import tiny_llama
from tests.vllm_servers import vllm_servers

SHAPE: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
TEXTS = ("What is a river?", "Count to three.", "Say nothing at all.", "Where do the swallows go?")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", scale=0.1, **SHAPE)


@pytest.fixture(scope="module")
def url(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *DENSE_TARGETS, "--dtype", "float32")
    logs = tmp_path_factory.mktemp("logs")
    with vllm_servers(base, logs, *flags, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as (found,):
        yield found


class StaleLoads(http.server.BaseHTTPRequestHandler):
    """Hands all on to the real server, but has it load one directory whatever it is asked to load."""

    real: str
    stale: Path

    def do_GET(self) -> None:
        self.hand_on(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/load_lora_adapter" and "lora_path" in (asked := json.loads(body)):
            body = json.dumps({**asked, "lora_path": str(self.stale)}).encode()
        self.hand_on(body)

    def hand_on(self, body: bytes | None) -> None:
        request = urllib.request.Request(f"{self.real}{self.path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, content = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def rollouts(base: Path, adapter: Path, url: str, output: Path) -> Path:
    """Sample greedily from a server -> output."""
    prompts = output.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    servers = ServerConfig(server=(url,), server_weights="prove", server_seeds=False)
    settings: dict[str, Any] = {"num_responses": 1, "max_tokens": 12, "temperature": 0.0, "allow_no_signal": True}
    generate_rollouts(
        GenerateConfig(model=base, adapter=adapter, prompts=prompts, output=output, servers=servers, **settings)
    )
    return output


def test_a_server_changes_adapters_and_answers_as_peft_does_and_an_old_adapter_under_a_new_name_is_refused(
    base: Path, url: str, tmp_path: Path
) -> None:
    adapters = [random_adapter(tmp_path / str(seed), base, scale=0.1, seed=seed) for seed in range(3)]
    answers = []
    for number, adapter in enumerate(adapters[:2]):
        policy = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        policy = peft.PeftModel.from_pretrained(policy, adapter).eval()
        answers.append([])
        for group in read_rollouts(rollouts(base, adapter, url, tmp_path / f"rollouts-{number}")):
            tokens = torch.tensor([group.prompt_token_ids])
            with torch.no_grad():
                out = policy.generate(input_ids=tokens, max_new_tokens=12, do_sample=False, eos_token_id=[2])
            assert tuple(out[0, tokens.shape[1] :].tolist()) == group.responses[0].token_ids
            answers[-1].append(group.responses[0].token_ids)
    assert answers[0] != answers[1]

    handler = type("Stale", (StaleLoads,), {"real": url, "stale": adapters[1]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_address[1]}"
        with pytest.raises(ConfigError, match="exactly what it computes with the adapter sppo-"):
            rollouts(base, adapters[2], address, tmp_path / "refused")
        proxy.shutdown()
    assert not [*(tmp_path / "refused").glob("shard-*")]
