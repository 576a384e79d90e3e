"""New weights for a running vLLM server, and the proof of what it holds, before a token is sampled from it.

A server is asked which weights it has. If they are not the policy's, it loads them from the policy's directory
(`reload_weights`) and forgets its prefix cache, and it is asked again. Two things are asked: log-probabilities of fixed
texts (`probes`), which every server can tell and which show what it computes; and sums over every weight, exact to the
bit, where it runs our worker extension (`served_weights`). "200 OK" proves nothing: servers have answered it and gone
on with old weights.

Loading needs vLLM's development routes (VLLM_SERVER_DEV_MODE=1). Weights of other names or shapes kill the engine, so
they are compared before. vLLM is told a name for the weights (`weight_version`), which a restart loses: that is how a
server which came back with the weights it was started with is noticed later.
"""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.rollout.openai_server import EmptyReply, HttpError, NoReply, ServerFault, UnusableReply
from megatron_sppo.rollout.policy import Policy
from megatron_sppo.rollout.probes import TOLERANCE, TOLERANCES
from megatron_sppo.rollout.weight_sums import Sums, added

logger = logging.getLogger(__name__)

EXTENSION = "megatron_sppo.rollout.served_weights.ServedWeights"
_RESTART = f"Restart it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {EXTENSION}"
_EXPERTS = ".experts."
"""Part of the names of weights that the extension does not tell."""
_OPTIONAL = ("lm_head.weight", ".inv_freq")
_RESET_TRIES, _RESET_PAUSE_SECONDS = 8, 0.25
"""The pause doubles: half a minute in all, for requests of a run that was killed to end."""


class Unproven(ServerFault):
    """The server cannot be shown to hold the policy's weights, and another try changes nothing."""


class CannotTell(ServerFault):
    """The server gives no log-probabilities of prompts."""


class DiedLoading(NoReply):
    """The server was lost while it loaded weights."""


class AskedServer(Protocol):
    """What is asked of a server here."""

    @property
    def root(self) -> str | None:
        """The model directory that it was started with, as it says; None: it does not say."""
        ...

    def log_probs(self, token_ids: Sequence[int]) -> list[float]:
        """Ask for the log-probability of each token but the first -> nats. Raises CannotTell."""
        ...

    def control(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request to one of vLLM's development routes -> its JSON object."""
        ...


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What shows that a server holds the policy's weights."""

    distance: float
    """Of the probes, `Probes.distance`."""
    num_sums: int
    """Weights whose sums are equal to the files'; 0: it was not asked, or cannot tell."""
    num_weights: int
    """Weights in the files."""
    was_loaded: bool
    is_marked: bool
    """Whether it was told a name for the weights."""
    salt: str | None
    """Goes with each request: vLLM uses no prefix that was computed under another (`cache_salt`). None: it takes no new
    weights, so its cache is of these."""

    def __str__(self) -> str:
        """Spell it for the log."""
        exact = f"{self.num_sums} of {self.num_weights} weights are equal to the bit" if self.num_sums else ""
        probes = f"log-probabilities of fixed texts differ by {self.distance:.4f} standard deviations"
        return f"{exact}, {probes}" if exact else f"{probes}; weights were not compared"


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a server says it holds."""

    log_probs: tuple[tuple[float, ...], ...]
    distance: float
    sums: Sums | None
    """None: it runs without our extension."""
    dtypes: dict[str, str]


def prove(server: AskedServer, policy: Policy, *, must_be_sure: bool) -> Proof:
    """Make a server hold the policy's weights -> Proof that it does.

    Args:
        must_be_sure: weights have been replaced before or will be, so that log-probabilities within rounding are not
            enough where the weights before could have given them too.

    Raises:
        CannotTell: it gives no log-probabilities, and there is no telling what it holds.
        Unproven: it holds other weights and cannot be given these, or does not hold them although it was.
        ServerFault: it died, hung or answered what is no answer.
    """
    held = _ask(server, policy)
    fault = _fault(held, policy)
    if not can_be_given_weights(server):
        if fault is not None or must_be_sure:
            fault = fault or "whether it holds the policy's weights or those of an earlier iteration cannot be told"
            way_out = "" if must_be_sure else ", or use --server-weights trust if it holds them in another form"
            raise Unproven(f"{fault}, and it takes no new ones. {_RESTART}{way_out}.")
        return _proof(held, policy, was_loaded=False)
    _reset_prefix_cache(server)
    # The base of an adapter is what the server was started with, and no iteration replaces it.
    is_known = policy.adapter is not None or _is_exact(held, policy) or _mark(server) == policy.mark
    if fault is None and is_known:
        return _proof(held, policy, was_loaded=False, by=server)
    _check_fits(server, policy, held)
    _load(server, policy, has_extension=held.sums is not None)
    after = _ask(server, policy)
    fault = _fault(after, policy)
    if fault is not None:
        remedy = "Restart it, and see its log" if after.sums is not None else _RESTART
        raise Unproven(f"it answered that it had loaded {policy.directory}, but {fault}. {remedy}.")
    is_unchanged = after.log_probs == held.log_probs and not _is_exact(after, policy)
    if is_unchanged and must_be_sure and not _was_started_with(server, policy):
        raise Unproven(
            f"it answered that it had loaded {policy.directory}, but computes exactly what it did before. {_RESTART}."
        )
    return _proof(after, policy, was_loaded=True, by=server)


def still_holds(server: AskedServer, policy: Policy, proof: Proof) -> bool:
    """Ask a proven server again, in short -> whether it has neither been restarted nor given other weights since."""
    if proof.is_marked:
        return _mark(server) == policy.mark
    return _fault(_ask(server, policy), policy) is None


def can_be_given_weights(server: AskedServer) -> bool:
    """Ask whether a server has vLLM's development routes; changes nothing."""
    try:
        server.control("/collective_rpc", {})
    except HttpError as error:
        return error.status not in (401, 403, 404, 405, 501)  # 400: no method was named
    except UnusableReply:
        return False
    return True


def _ask(server: AskedServer, policy: Policy) -> _Held:
    log_probs = tuple(tuple(server.log_probs(ids)) for ids in policy.probes().token_ids)
    sums, dtypes = _sums(server)
    return _Held(log_probs=log_probs, distance=policy.probes().distance(log_probs), sums=sums, dtypes=dtypes)


def _sums(server: AskedServer) -> tuple[Sums | None, dict[str, str]]:
    try:
        results = _call(server, "sppo_weights")
    except UnusableReply:
        return None, {}
    except HttpError as error:  # 404: no development routes; 500: the worker has no such method
        if "sppo_weights" in error.words or error.status < 500:
            return None, {}
        raise
    shares: list[Sums] = []
    dtypes: dict[str, str] = {}
    replicas = 1
    try:
        for rank in results:
            shares.append({name: (int(value, 16), int(count)) for name, (value, count) in rank["sums"].items()})
            dtypes |= {str(name): str(dtype) for name, dtype in rank["dtypes"].items()}
            replicas = int(rank["data_parallel"])
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UnusableReply("sppo_weights gave no sums of weights") from None
    if not shares:
        return None, {}
    if replicas > 1:
        raise Unproven(
            f"it is {replicas} replicas behind one address, of which one alone would be asked. Start a server for each "
            "(without --data-parallel-size), and give --server all their URLs."
        )
    return added(shares), dtypes


def _fault(held: _Held, policy: Policy) -> str | None:
    """Find what shows that other weights are held -> in words, or None."""
    kinds = {TOLERANCES.get(kind, TOLERANCE) for kind in held.dtypes.values()} or {TOLERANCE}
    if held.sums is not None:
        truth = policy.sums(held.dtypes)
        if other := [name for name, value in truth.items() if held.sums[name] != value]:
            return (
                f"{len(other)} of its {len(held.sums)} weights are others than in {policy.directory} "
                f"({some_of(other, most=2)})"
            )
    if not held.distance <= max(kinds):
        return (
            f"its log-probabilities of fixed texts differ by {held.distance:.3f} standard deviations from those of "
            f"{policy.directory}, where rounding makes up to {max(kinds):g}"
        )
    return None


def _is_exact(held: _Held, policy: Policy) -> bool:
    """Whether sums tell of every weight; those of experts are never told."""
    return held.sums is not None and not _untold(held.sums, policy)


def _untold(sums: Sums, policy: Policy) -> list[str]:
    told = {policy.named(name) for name in sums}
    return [name for name in _shapes(policy.files) if name not in told and _EXPERTS not in name]


def _num_told(held: _Held, policy: Policy) -> int:
    """Count the weights in the files that a server's sums speak of."""
    return len({policy.named(name) for name in held.sums or {}} - {None})


def _proof(held: _Held, policy: Policy, *, was_loaded: bool, by: AskedServer | None = None) -> Proof:
    """Put a proof together.

    Args:
        by: a server that takes weights; it is told a name for those that it holds.
    """
    return Proof(
        distance=held.distance,
        num_sums=_num_told(held, policy),
        num_weights=len(policy.files.entries),
        was_loaded=was_loaded,
        is_marked=by is not None and _set_mark(by, policy),
        salt=None if by is None else f"{policy.mark}-{secrets.token_hex(8)}",
    )


def _check_fits(server: AskedServer, policy: Policy, held: _Held) -> None:
    """Refuse files that would kill the engine: of another architecture, or that the server's machine does not see.

    Raises:
        Unproven: names the first difference.
    """
    new = _shapes(policy.files)
    remedy = f"Restart it with the model of --model: `vllm serve {policy.directory}`."
    if server.root is not None and (Path(server.root) / CONFIG_FILE).is_file():
        try:
            own = _shapes(open_hf_checkpoint(Path(server.root)))
        except ConversionError:
            own = new  # nothing that can be compared; what the server holds will tell
        if other := sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name)):
            raise Unproven(
                f"it was started with {server.root}, whose weights have other names or shapes than those in "
                f"{policy.directory} ({some_of(other, most=2)}). {remedy}"
            )
    if held.sums is None:
        return
    wrong = f"it runs another architecture than that of {policy.directory}"
    if more := [name for name in held.sums if policy.named(name) is None]:
        raise Unproven(f"{wrong}: it has {some_of(more, most=2)} beside. {remedy}")
    if missing := _untold(held.sums, policy):
        raise Unproven(f"{wrong}: it has no {some_of(missing, most=2)}. {remedy}")
    for name, (_, count) in policy.sums(held.dtypes).items():
        if held.sums[name][1] != count:
            raise Unproven(f"{wrong}: {name} has {held.sums[name][1]} numbers there and {count} here. {remedy}")
    _check_seen(server, policy)


def _shapes(files: HFCheckpoint) -> dict[str, tuple[int, ...]]:
    """List what an engine must have a place for -> {name: shape}; what it computes or shares may lie in the files."""
    return {name: entry.shape for name, entry in files.entries.items() if not name.endswith(_OPTIONAL)}


def _check_seen(server: AskedServer, policy: Policy) -> None:
    needed = {entry.file.name: entry.file.stat().st_size for entry in policy.files.entries.values()}
    for seen in _call(server, "sppo_files", directory=str(policy.directory.absolute())):
        found = seen if isinstance(seen, dict) else {}
        if missing := sorted(name for name, size in needed.items() if found.get(name) != size):
            raise Unproven(
                f"its machine does not see {policy.directory.absolute()} as it is here ({some_of(missing, most=2)}: "
                f"{found.get(missing[0], 'no')} bytes there, {needed[missing[0]]} here). "
                "Keep models and the run on a file system that servers share."
            )


def _load(server: AskedServer, policy: Policy, *, has_extension: bool) -> None:
    start = time.monotonic()
    try:
        _call(server, "reload_weights", weights_path=str(policy.directory.absolute()))
        if has_extension:
            _call(server, "sppo_mend")
    except NoReply as error:
        raise DiedLoading(f"it died or hung while it loaded {policy.directory.absolute()} ({error})") from None
    except HttpError as error:
        raise Unproven(
            f"it does not load {policy.directory.absolute()} ({error}). "
            "Its machine must see that directory; see its log."
        ) from None
    _reset_prefix_cache(server)
    logger.debug("weights were loaded in %.1f s", time.monotonic() - start)


def _call(server: AskedServer, method: str, **arguments: str) -> list[Any]:
    """Call a method of the server's workers -> what each gave."""
    results = server.control("/collective_rpc", {"method": method, "kwargs": arguments}).get("results")
    if not isinstance(results, list):
        raise UnusableReply(f"{method} gave no list of results")
    return results


def _reset_prefix_cache(server: AskedServer) -> None:
    """Let nothing that was computed with other weights be used again. It fails while requests are at work.

    Older versions of vLLM (0.23) do not say whether it succeeded; there `Proof.salt` alone keeps old prefixes away.
    """
    for attempt in range(_RESET_TRIES):
        if attempt:
            time.sleep(_RESET_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            success = server.control("/reset_prefix_cache", {}).get("success")
        except HttpError as error:
            raise Unproven(f"it does not reset its prefix cache ({error}). See its log.") from None
        except EmptyReply:
            return
        if success is True:
            return
    raise Unproven(
        "it does not reset its prefix cache: it is at work on requests of others. Give each job servers of its own."
    )


def _mark(server: AskedServer) -> str | None:
    """Ask what the server calls its weights -> None where this vLLM knows no names for them."""
    try:
        name = server.control("/weight_info").get("weight_version")
    except (HttpError, UnusableReply):
        return None
    return name if isinstance(name, str) else None


def _set_mark(server: AskedServer, policy: Policy) -> bool:
    try:
        server.control("/update_weight_version", {"new_version": policy.mark})
    except (HttpError, UnusableReply):
        return False
    return _mark(server) == policy.mark


def _was_started_with(server: AskedServer, policy: Policy) -> bool:
    """Tell whether the server has never been given weights, and was started with the policy's -> bool."""
    try:
        is_same = server.root is not None and Path(server.root).samefile(policy.directory)
    except OSError:
        return False
    return is_same and _mark(server) in (None, "default")
