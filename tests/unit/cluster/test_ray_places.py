"""Proves how many workers a cluster has room for and where they go, by what Ray lists. Ray is not started.

That an actor gets what it asks for is Ray's own; tests/e2e/test_cluster_rollouts.py has real actors.
"""

from types import SimpleNamespace

import pytest

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.ray_team import _Places, _reason, connect
from megatron_sppo.errors import ConfigError


def places(nodes, *, num_gpus=1, workers=None, ray="auto"):
    listed = [{"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu}} for cpu, gpu in nodes]
    listed.append({"Alive": False, "Resources": {"CPU": 64, "GPU": 64}})
    return _Places(SimpleNamespace(nodes=lambda: listed), PoolConfig(workers=workers, ray=ray), num_gpus)


@pytest.mark.parametrize(
    ("nodes", "num_gpus", "expected"),
    [
        ([(8, 0), (8, 8), (8, 8)], 1, 16),  # a head without GPUs
        ([(8, 8), (8, 8)], 4, 4),
        ([(8, 8), (8, 6)], 4, 3),  # 2 GPUs of the second node are left over
        ([(8, 8)] * 4, 16, 2),  # two nodes an engine
        ([(16, 0), (16, 0), (16, 0)], 2, 3),  # no GPU anywhere: an engine a node
    ],
)
def test_a_cluster_is_filled_where_nothing_is_said(nodes, num_gpus, expected):
    assert places(nodes, num_gpus=num_gpus).num_workers == expected


def test_a_worker_takes_its_gpus_of_one_node_and_a_cpu_where_there_are_none():
    assert places([(8, 8)], num_gpus=2).options(0)["num_gpus"] == 2
    options = places([(4, 0), (4, 0)], num_gpus=2).options(0)
    assert (options["num_gpus"], options["num_cpus"], options["scheduling_strategy"]) == (0, 1, "SPREAD")
    assert not places([(8, 8)], num_gpus=8).spans_nodes
    assert places([(8, 8), (8, 8)], num_gpus=16).spans_nodes


def test_several_workers_may_share_a_node_without_gpus(caplog):
    assert places([(4, 0), (4, 0)], workers=8).num_workers == 8
    assert not caplog.records


def test_workers_for_which_there_is_no_room_yet_are_named(caplog):
    assert places([(8, 8)], num_gpus=4, workers=3).num_workers == 3
    assert "room for 2 of 3 workers (4 GPUs each)" in caplog.text


@pytest.mark.parametrize(
    ("nodes", "num_gpus", "words"),
    [
        ([(8, 2), (8, 2)], 8, "one worker takes 8 GPUs, the cluster has 4 GPUs and 16 CPUs on 2 nodes"),
        ([(0, 0)], 1, "one worker takes a CPU, the cluster has 0 GPUs and 0 CPUs on 1 nodes"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_at_once(nodes, num_gpus, words):
    with pytest.raises(ConfigError, match=words):
        places(nodes, num_gpus=num_gpus)


def test_a_machine_that_has_too_few_gpus_will_not_have_more():
    with pytest.raises(ConfigError, match=r"3 workers take 4 GPUs each, this machine has 8 GPUs\. Use --workers 2\."):
        places([(8, 8)], num_gpus=4, workers=3, ray=None)


def test_a_thousand_processes_are_not_started_on_one_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"--workers 33: .* 4 CPUs\. Use --workers 4, or --ray with a cluster\."):
        connect(PoolConfig(workers=33))


# As Ray 2.60 words them.
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: Desk
\tactor_id: 0a1b
\tpid: 4711
\tnamespace: 77aa
\tip: 10.0.0.3
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file."""
UNMADE = """The actor died because of an error raised in its creation task, \
\x1b[36mray::Desk.__init__()\x1b[39m (pid=4711, ip=10.0.0.3, actor_id=0a1b, repr=<Desk>)
  File "python/ray/includes/common.pxi", line 1, in x
ModuleNotFoundError: No module named 'megatron_sppo'
"""


def test_of_ray_s_message_the_cause_and_the_machine_are_told():
    told = _reason(RuntimeError(KILLED))
    assert told == "Worker unexpectedly exits with a connection error code 2. End of file on 10.0.0.3"
    assert _reason(RuntimeError(UNMADE)) == "ModuleNotFoundError: No module named 'megatron_sppo' on 10.0.0.3"
    assert _reason(RuntimeError("The actor is temporarily unavailable")) == "The actor is temporarily unavailable"
    assert len(_reason(RuntimeError("x" * 5000))) < 300


def test_a_ray_that_does_not_start_in_its_time_is_one_line(monkeypatch):
    """Ray's own error on a busy machine is an Exception and no more (2.60, _private/node.py)."""
    ray = pytest.importorskip("ray")

    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    words = r"^--workers 2: Ray does not start or answer \(The current node timed out.*when this machine is less busy"
    with pytest.raises(ConfigError, match=words):
        connect(PoolConfig(workers=2))
