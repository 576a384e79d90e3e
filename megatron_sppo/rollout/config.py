"""Settings of the rollout stage: the job, its chat template, its engine or servers."""

import json
import re
import urllib.parse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.config import LAYOUT, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed, check_ranges
from megatron_sppo.errors import ConfigError

Temperature = Annotated[float, Range(0, 100)]
"""Published runs sample at 0.7 and 1; at 100 every token is nearly as likely as any other."""
TopP = Annotated[float, Range(0, 1, above=True)]

SAMPLING_PRESETS = {"paper": {"temperature": 1.0, "top_p": 1.0}, "official": {"temperature": 0.7, "top_p": 0.9}}
"""Sampling of the paper, and of the authors' published scripts."""

MAX_LORA_RANK = 512
"""vLLM 0.32, config/lora.py: the largest that its buffers may be made for."""

_OWN_ARGUMENTS = frozenset(
    {
        "messages",
        "conversation",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "continue_final_message",
        "tools",
    }
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that responses are drawn from: the policy pi_t of the objective."""

    num_responses: PositiveInt
    temperature: Temperature
    top_p: TopP
    max_tokens: PositiveInt
    seed: Seed
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end an answer, beside what an engine knows by itself."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.temperature == 0 and self.num_responses > 1:
            raise ConfigError(
                f"temperature is 0: all {self.num_responses} responses would be the same. "
                "Use --temperature above 0, or --num-responses 1."
            )

    def as_dict(self) -> dict[str, Any]:
        """Spell the settings as the manifest holds them."""
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """Which chat template renders prompts, and with which arguments."""

    chat_template: Path | None = None
    """Jinja file in place of the model's chat template."""
    chat_template_name: str | None = None
    """Which of the model's named chat templates; None takes the one called default."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the chat template: NAME=VALUE such as enable_thinking=false, or a JSON object."""

    def __post_init__(self) -> None:
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Read the arguments -> {name: value}; a value that is no JSON is a text.

        Raises:
            ConfigError: what is neither NAME=VALUE nor a JSON object, or an argument that rendering itself decides.
        """
        found: dict[str, Any] = {}
        for item in self.chat_template_kwargs:
            name, equals, value = item.partition("=")
            try:
                more = json.loads(item) if item.lstrip().startswith("{") else {name: _value(value)} if equals else None
            except ValueError:
                more = None
            if not isinstance(more, dict) or not all(key.isidentifier() for key in more):
                raise ConfigError(
                    f"chat_template_kwargs: {item!r} is neither NAME=VALUE nor a JSON object. "
                    "Use --chat-template-kwargs enable_thinking=false."
                )
            found |= more
        for name in found:
            if name in _OWN_ARGUMENTS:
                raise ConfigError(f"chat_template_kwargs: {name} is decided by rendering itself. Leave it out.")
        return found


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How vLLM runs the model."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights and activations while sampling; auto takes the checkpoint's."""
    tensor_parallel_size: Annotated[PositiveInt, LAYOUT] = 1
    """GPUs that share the model."""
    gpu_memory_utilization: Annotated[float, Range(0, 1, above=True)] = 0.9
    """Fraction of each GPU's memory that vLLM may take. Without a GPU it has no effect."""
    max_num_seqs: PositiveInt | None = None
    """Responses computed at once. None: vLLM's choice on GPUs, 256 on CPU."""
    enforce_eager: bool | None = None
    """Do not compile the model. None: compiled on GPUs, not on CPU, where a minute of compiling gains about a tenth."""
    max_lora_rank: Annotated[int | None, Range(1, MAX_LORA_RANK)] = None
    """Rank that the engine has room for, 1 to 512, where the model is to get adapters later and be asked alone first:
    self-play with adapters sets it, so that one engine serves all of a run. None: the rank of --adapter."""
    lora_target_modules: tuple[str, ...] = ()
    """With --max-lora-rank: modules that adapters may be of, such as q_proj; experts for all of a mixture's. Unset: all
    linear modules of the layers."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the servers are, and how patient to be."""

    server: Annotated[tuple[str, ...], LAYOUT] = ()
    """URLs of running vLLM servers with this model, such as http://node1:8000; without any, vLLM runs here."""
    server_weights: Annotated[Literal["ask", "prove", "trust"], LAYOUT] = "ask"
    """What a server must show before it is sampled from. ask: that it holds the weights of --model, which it is given
    where it holds others; one that cannot tell is sampled from with a warning. prove: one that cannot tell is left out.
    trust: nothing is asked."""
    server_model: str | None = None
    """Name of the model on the servers; None takes the one that they serve."""
    server_concurrency: PositiveInt = 64
    """Requests in flight per server; each is one prompt with its K responses."""
    server_timeout: PositiveFloat = 600.0
    """Seconds for one request."""
    server_retries: NonNegativeInt = 5
    """Times that a failed request is sent again."""
    server_seeds: bool = True
    """Send a seed with each request. vLLM servers on CPU crash on seeds: use --no-server-seeds there."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for url in self.server:
            try:
                parts = urllib.parse.urlsplit(url)
                is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # no port, or half an IPv6 address
                is_address = False
            if not is_address or re.search(r"[^\x21-\x7e]", url):
                raise ConfigError(f"{url!r} is no server URL. Use --server http://HOST:PORT.")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ConfigError(
                    f"the URL of the server {parts.hostname} has more than an address. Use --server http://HOST:PORT; "
                    "a key goes into VLLM_API_KEY, a model's name into --server-model."
                )
        bases = [url.rstrip("/").removesuffix("/v1") for url in self.server]
        if double := [url for url, base in zip(self.server, bases, strict=True) if bases.count(base) > 1]:
            raise ConfigError(f"--server names {double[-1]} twice. Name each server once.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One rollout job."""

    model: Annotated[Path, LAYOUT]
    """Hugging Face directory of the policy; its tokenizer and chat template make the prompts' token ids."""
    adapter: Annotated[Path | None, LAYOUT] = None
    """PEFT directory of a LoRA adapter (adapter_config.json, adapter_model.safetensors): the policy is --model with it.
    vLLM takes it on top of the base's weights, which are read once; servers load it by themselves, for which they need
    --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. That it is in use is proven before anything is sampled."""
    prompts: Annotated[Path, LAYOUT]
    """File (.jsonl, .json, .csv, .tsv, .parquet, plain or .gz, .zst), dataset directory or hub:NAME[:SUBSET][@SPLIT]:
    rows with `prompt` or `messages`, or in the columns of ShareGPT, UltraFeedback, HH, Nectar, Alpaca or Orca."""
    output: Annotated[Path, LAYOUT]
    """Directory for the rollouts; the same command again resumes there."""
    num_responses: PositiveInt
    """K, answers per prompt; the paper uses 5."""
    max_tokens: PositiveInt
    """Most tokens of an answer."""
    preset: Literal["paper", "official"] = "paper"
    """paper: temperature 1.0, top-p 1.0; official: 0.7 and 0.9."""
    temperature: Temperature | None = None
    """None takes the preset's."""
    top_p: TopP | None = None
    """None takes the preset's."""
    seed: Seed = 0
    """Every shard's seed follows from it."""
    split: str | None = None
    """Keep the rows of this split only, such as train or heldout."""
    subset: str | None = None
    """The subset of a dataset directory, or of a data set of the hub, that holds several."""
    offset: NonNegativeInt = 0
    """Prompts to skip."""
    limit: PositiveInt | None = None
    """Most prompts to take."""
    keep_columns: tuple[str, ...] = ()
    """Columns of the prompts that travel with the answers to a judge of your own (python:FILE:FUNCTION). IFEval's and
    the right answers of mathematical sets travel by themselves."""
    shard_size: PositiveInt | None = None
    """Prompts per shard; the shards at work are what a kill can cost. None: that of the rollouts that --output already
    has some of; else 64 on a CPU or with --server, and on GPUs as many as make 16384 shards, 4 to 512."""
    max_model_len: PositiveInt | None = None
    """Most tokens of prompt and answer together; None takes the model's. Longer prompts are set aside."""
    allow_no_signal: Annotated[bool, LAYOUT] = False
    """Accept rollouts in which no prompt got two different answers, or every answer is empty."""
    template: TemplateConfig = field(default_factory=TemplateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    servers: ServerConfig = field(default_factory=ServerConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.servers.server and not self.pool.is_embedded:
            given = f"--ray {self.pool.ray}" if self.pool.ray else f"--workers {self.pool.workers}"
            raise ConfigError(
                f"--server asks all servers from this process, and {given} starts engines. Use one of them; several "
                "servers are --server URL URL."
            )
        if self.max_model_len is not None and self.max_model_len <= self.max_tokens:
            raise ConfigError(
                f"max_model_len ({self.max_model_len}) leaves no room for a prompt beside max_tokens "
                f"({self.max_tokens}). Use --max-model-len {self.max_tokens + 512}."
            )
        self.sampling()

    def sampling(self) -> Sampling:
        """Resolve preset and explicit settings; the explicit ones win -> Sampling."""
        preset = SAMPLING_PRESETS[self.preset]
        return Sampling(
            num_responses=self.num_responses,
            temperature=preset["temperature"] if self.temperature is None else self.temperature,
            top_p=preset["top_p"] if self.top_p is None else self.top_p,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )
