"""An adapter for a running vLLM server, and the proof that it is used, before a token is sampled with it.

The server loads it by `/v1/load_lora_adapter` under the name of its content, which no other version has, so neither a
name, an id nor a prefix cache of an earlier one can be taken for it. Its base stays as it is. A server needs
--enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 for that.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_sppo.checkpoints.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PeftAdapter
from megatron_sppo.rollout.adapter_proof import HeldAdapters, LogProbs, adapter_name, find_fault, read_held
from megatron_sppo.rollout.hand_over import DiedLoading, Unproven
from megatron_sppo.rollout.openai_server import HttpError, NoReply, UnusableReply
from megatron_sppo.rollout.policy import Policy

logger = logging.getLogger(__name__)

LOAD_ROUTE = "/v1/load_lora_adapter"
_OURS = "sppo-"
_NO_ROUTE = (401, 403, 404, 405, 501)


class AdaptedServer(Protocol):
    """What is asked of a server here."""

    def log_probs(self, token_ids: Sequence[int], *, of_adapter: str | None = None) -> list[float]:
        """Ask for the log-probability of each token but the first -> nats. Raises CannotTell."""
        ...

    def adapters(self) -> dict[str, str]:
        """Ask which adapters it has -> {name: directory}, in the order in which it got them."""
        ...

    def control(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request to a route beside /v1 -> its JSON object."""
        ...


def takes_adapters(server: AdaptedServer) -> bool:
    """Ask whether a server has the route by which adapters are loaded; changes nothing."""
    try:
        server.control(LOAD_ROUTE, {})
    except HttpError as error:
        return error.status not in _NO_ROUTE  # 400, 422: no adapter was named
    except UnusableReply:
        return False
    return True


def load_adapter(server: AdaptedServer, adapter: PeftAdapter) -> bool:
    """Have a server load an adapter -> whether it had not yet.

    Raises:
        Unproven: it takes none, or not this one.
        ServerFault: it died, hung or answered what is no answer.
    """
    name, path = adapter_name(adapter), str(adapter.directory.absolute())
    if name in server.adapters():
        return False
    try:
        server.control(LOAD_ROUTE, {"lora_name": name, "lora_path": path})
    except UnusableReply:
        pass  # it agrees in words (vLLM 0.32); what it lists is what counts
    except NoReply as error:
        raise DiedLoading(f"it died or hung while it loaded the adapter {path} ({error})") from None
    except HttpError as error:
        if error.status in _NO_ROUTE and "adapter" not in error.words:
            raise Unproven(
                f"it takes no adapters ({error}). Restart it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora "
                f"and --max-lora-rank {adapter.rank} or more."
            ) from None
        raise Unproven(
            f"it does not load the adapter {path} ({error}). Its machine must see that directory, and it must run with "
            f"--max-lora-rank {adapter.rank} or more; see its log."
        ) from None
    if name not in server.adapters():
        raise Unproven(f"it answered that it had loaded the adapter {path}, but does not list {name}. See its log.")
    return True


def prove_adapter(server: AdaptedServer, policy: Policy) -> float:
    """Have a server, whose base is proven, use the policy's adapter -> distance of the probes (`Probes.distance`).

    Raises:
        CannotTell: it gives no log-probabilities.
        Unproven: it does not take the adapter, or does not compute with it although it says so.
        ServerFault: it died, hung or answered what is no answer.
    """
    adapter, start = _adapter(policy), time.monotonic()
    # Before the adapter's first request: on a CPU, requests for the base get the result of those beside them.
    others: dict[str, LogProbs] = {"the base alone": _ask(server, policy, None)}
    before = server.adapters()
    if load_adapter(server, adapter):
        for other in [name for name in before if _can_be_asked(name, before[name], adapter)][-1:]:
            others[f"the adapter {other}"] = _ask(server, policy, other)
    log_probs = _ask(server, policy, adapter_name(adapter))
    probes = policy.adapted_probes()
    fault = find_fault(adapter, probes, log_probs=log_probs, others=others, held=_held(server))
    if fault is not None:
        raise Unproven(f"it answered that it had loaded the adapter, but {fault}. Restart it, and see its log.")
    logger.debug("an adapter was loaded and proven in %.1f s", time.monotonic() - start)
    return probes.distance(log_probs)


def still_uses(server: AdaptedServer, policy: Policy) -> bool:
    """Ask a proven server again, with requests of the adapter at work -> whether it still computes with base and it."""
    adapter = _adapter(policy)
    name = adapter_name(adapter)
    if name not in server.adapters():
        return False
    log_probs = _ask(server, policy, name)
    return find_fault(adapter, policy.adapted_probes(), log_probs=log_probs, others={}, held=_held(server)) is None


def _adapter(policy: Policy) -> PeftAdapter:
    assert policy.adapter is not None
    return policy.adapter


def _ask(server: AdaptedServer, policy: Policy, name: str | None) -> LogProbs:
    return [server.log_probs(ids, of_adapter=name) for ids in policy.adapted_probes().token_ids]


def _held(server: AdaptedServer) -> HeldAdapters | None:
    """Ask what lies in the workers' slots -> HeldAdapters, None: they do not tell."""
    try:
        results = server.control("/collective_rpc", {"method": "sppo_adapters", "kwargs": {}}).get("results")
    except UnusableReply:
        return None
    except HttpError as error:  # 404: no development routes; 500: the worker has no such method
        if "sppo_adapters" in error.words or error.status < 500:
            return None
        raise
    if not isinstance(results, list):
        raise UnusableReply("sppo_adapters gave no list of results")
    held = read_held(results)
    return held if held.dtype else None


def _can_be_asked(name: str, directory: str, adapter: PeftAdapter) -> bool:
    """Tell whether asking for an earlier adapter is safe, and tells something.

    vLLM may have to load it again for that, and an engine that fails at it in the midst of a request hangs (vLLM 0.32).
    """
    place = Path(directory)
    is_there = (place / ADAPTER_CONFIG).is_file() and (place / ADAPTER_WEIGHTS).is_file()
    return name.startswith(_OURS) and is_there and place.absolute() != adapter.directory.absolute()
