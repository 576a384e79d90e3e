"""Proves the rollout job with a fake sampler: what it asks for, what it writes, what it keeps, redoes and refuses.

Not here: that vLLM samples from the model (tests/e2e/test_self_play_vllm.py).
"""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from megatron_sppo.checkpoints.model_files import model_hash
from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.rollout import finished_shards
from megatron_sppo.rollout.chat_template import ChatTokenizer
from megatron_sppo.rollout.config import GenerateConfig, ServerConfig, TemplateConfig
from megatron_sppo.rollout.generate import _default_shard_size, generate_rollouts, shard_seed
from megatron_sppo.rollout.prompts import PromptRows
from megatron_sppo.rollout.records import EngineSteps, Response, read_manifest, read_rollouts
from megatron_sppo.rollout.sampler import Refusal
from tests.unit.rollout.fake_sampler import FakeSampler, fake_factory

NUM_PROMPTS = 10


@pytest.fixture
def config(tiny_llama_dir: Path, tmp_path: Path) -> GenerateConfig:
    """Ten prompts in four shards of three: the last has one."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "rollouts"
    return GenerateConfig(
        model=tiny_llama_dir, prompts=prompts, output=output, num_responses=3, max_tokens=8, shard_size=3
    )


def run(config: GenerateConfig) -> list[list[str]]:
    """Generate with a fresh fake sampler -> the prompt ids of each shard that was sampled."""
    sampler = FakeSampler()
    generate_rollouts(config, make_sampler=fake_factory(sampler))
    return [ids for ids, _ in sampler.calls]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if not path.name.startswith(".")}


def test_all_prompts_get_k_responses_in_file_order(config: GenerateConfig) -> None:
    assert [len(ids) for ids in run(config)] == [3, 3, 3, 1]
    groups = list(read_rollouts(config.output))
    assert [group.prompt_id for group in groups] == [f"p{i}" for i in range(NUM_PROMPTS)]
    assert all(len(group.responses) == 3 for group in groups)
    assert groups[4].prompt_text == "<|im_start|>user\nWhat is 4 plus 4?<|im_end|>\n<|im_start|>assistant\n"


def test_the_manifest_identifies_model_tokenizer_and_sampling(config: GenerateConfig, tiny_llama_dir: Path) -> None:
    run(config)
    manifest = read_manifest(config.output)
    assert manifest.model_hash == model_hash(tiny_llama_dir)
    assert manifest.tokenizer_hash == tokenizer_hash(tiny_llama_dir)
    assert manifest.vocab_size == 259
    assert manifest.num_prompts == NUM_PROMPTS
    expected = {"num_responses": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "seed": 0}
    assert manifest.sampling == {**expected, "stop_token_ids": [2], "chat_template_kwargs": {}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"preset": "paper"}, (1.0, 1.0)),
        ({"preset": "official"}, (0.7, 0.9)),
        ({"preset": "official", "top_p": 0.5}, (0.7, 0.5)),
        ({"temperature": 1.3}, (1.3, 1.0)),
    ],
)
def test_presets_are_the_published_ones_and_explicit_settings_win(
    config: GenerateConfig, settings: dict[str, Any], expected: tuple[float, float]
) -> None:
    sampling = replace(config, **settings).sampling()
    assert (sampling.temperature, sampling.top_p) == expected


def test_every_shard_has_its_own_seed(config: GenerateConfig) -> None:
    seeds = {shard_seed(run_seed, index) for run_seed in range(10) for index in range(100)}
    assert len(seeds) == 1000
    sampler = FakeSampler()
    generate_rollouts(config, make_sampler=fake_factory(sampler))
    assert [seed for _, seed in sampler.calls] == [shard_seed(0, index) for index in range(4)]
    assert sampler.closed


def test_a_complete_directory_starts_no_engine_and_stays_as_it_is(config: GenerateConfig) -> None:
    run(config)
    before = files_of(config.output)

    def refuse(*_: Any) -> FakeSampler:
        raise AssertionError("an engine was started")

    generate_rollouts(config, make_sampler=refuse)
    assert files_of(config.output) == before


def test_what_is_complete_is_read_once_and_no_prompt_is_parsed_or_tokenised(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    monkeypatch.setattr(ChatTokenizer, "tokenize_all", lambda *_: pytest.fail("prompts are tokenised"))
    monkeypatch.setattr(PromptRows, "__iter__", lambda *_: pytest.fail("prompts are parsed"))
    hashed: list[Path] = []
    real = finished_shards.sha256_of_file
    monkeypatch.setattr(finished_shards, "sha256_of_file", lambda path: hashed.append(path) or real(path))
    assert run(config) == []
    assert hashed == [config.output / f"shard-{index:05d}.jsonl" for index in range(4)]


def test_a_directory_without_a_record_of_its_prompts_gets_one_when_it_is_gone_on_with(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions before left it, here before the manifest: the first run tokenises, and finds the same request.

    What is complete stays as it is: tests/unit/rollout/test_finished_shards.py.
    """
    run(config)
    before = files_of(config.output)
    request = read_json(config.output / "request.json")
    del request["prompts"]
    (config.output / "request.json").write_text(json.dumps(request, indent=2) + "\n")
    (config.output / "manifest.json").unlink()
    assert run(config) == []
    assert files_of(config.output) == before


def test_other_rows_behind_those_that_are_taken_change_nothing(config: GenerateConfig) -> None:
    config = replace(config, limit=7)
    run(config)
    with open(config.prompts, "a") as file:
        file.write(json.dumps({"prompt": "One more?"}) + "\n")
    assert run(config) == []
    (config.output / "shard-00001.jsonl").unlink()
    assert run(config) == [["p3", "p4", "p5"]]


def test_shards_that_are_answered_out_of_order_give_the_same_bytes(config: GenerateConfig, tmp_path: Path) -> None:
    class Backwards(FakeSampler):
        def sample(self, shards, *, sampling, on_progress):  # type: ignore[no-untyped-def]
            return super().sample(list(shards)[::-1], sampling=sampling, on_progress=on_progress)

    generate_rollouts(config, make_sampler=fake_factory(Backwards()))
    run(replace(config, output=tmp_path / "in_order"))
    assert files_of(config.output) == files_of(tmp_path / "in_order")


def test_a_sampler_that_forgets_a_shard_ends_the_job(config: GenerateConfig) -> None:
    class Forgetful(FakeSampler):
        def sample(self, shards, *, sampling, on_progress):  # type: ignore[no-untyped-def]
            return super().sample(list(shards)[:-1], sampling=sampling, on_progress=on_progress)

    with pytest.raises(DataError, match="answered 3 of 4 shards"):
        generate_rollouts(config, make_sampler=fake_factory(Forgetful()))
    assert not (config.output / "manifest.json").exists()


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, [4] * 275), (False, [64] * 17 + [12])])
def test_shards_are_small_on_gpus_unless_the_user_says(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, expected: list[int]
) -> None:
    import torch

    config.prompts.write_text("".join(json.dumps({"prompt": f"Why {i}?"}) + "\n" for i in range(1100)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert [len(ids) for ids in run(replace(config, shard_size=None))] == expected
    again = replace(config, output=config.output.with_name("explicit"), shard_size=600)
    assert [len(ids) for ids in run(again)] == [600, 500]


@pytest.mark.parametrize(("num_prompts", "size"), [(60_000, 4), (600_000, 36), (10_000_000, 512)])
def test_many_prompts_for_gpus_make_about_16384_shards(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, num_prompts: int, size: int
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _default_shard_size(config, num_prompts) == size


def test_servers_and_workers_together_are_refused(config: GenerateConfig) -> None:
    servers = ServerConfig(server=("http://node1:8000",))
    for pool, given in ((PoolConfig(workers=2), "--workers 2"), (PoolConfig(ray="auto"), "--ray auto")):
        with pytest.raises(ConfigError, match=f"--server asks all servers from this process, and {given} starts"):
            replace(config, servers=servers, pool=pool)


def test_a_run_goes_on_with_the_shard_size_that_it_was_begun_with(config: GenerateConfig) -> None:
    with pytest.raises(Killed):
        generate_rollouts(config, make_sampler=fake_factory(DyingSampler()))
    assert run(replace(config, shard_size=None)) == [["p3", "p4", "p5"], ["p6", "p7", "p8"], ["p9"]]


def test_how_full_the_engine_was_is_in_the_manifest_and_said(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Shard i takes 100 steps, i of which with fewer than half the slots; three before a kill, the fourth after it."""

    class Counting(FakeSampler):
        def sample(self, shards, *, sampling, on_progress):  # type: ignore[no-untyped-def]
            for answered in super().sample(shards, sampling=sampling, on_progress=on_progress):
                yield replace(answered, engine_steps=EngineSteps(total=100, under_half=answered.shard.index))
                if answered.shard.index == 2:
                    raise Killed

    with pytest.raises(Killed):
        generate_rollouts(config, make_sampler=fake_factory(Counting()))
    caplog.set_level("INFO")
    for _ in range(2):
        caplog.clear()
        generate_rollouts(config, make_sampler=fake_factory(Counting()))
        assert read_manifest(config.output).engine_steps == EngineSteps(total=400, under_half=6)
        said = "fewer than half of the engine's slots were busy in 1.5 % of its 400 steps"
        assert said in [record.getMessage() for record in caplog.records]


def test_the_engine_is_told_the_longest_prompt_with_its_answer(config: GenerateConfig) -> None:
    lengths = []
    generate_rollouts(config, make_sampler=lambda _, length: lengths.append(length) or FakeSampler())
    longest = max(len(group.prompt_token_ids) for group in read_rollouts(config.output))
    assert lengths == [longest + 8]


class Killed(BaseException):
    """What a kill looks like from inside the process."""


class DyingSampler(FakeSampler):
    """Dies in its second shard."""

    def answers(self, prompts, *, sampling, seed, on_progress):  # type: ignore[no-untyped-def]
        if len(self.calls) == 1:
            raise Killed
        return super().answers(prompts, sampling=sampling, seed=seed, on_progress=on_progress)


def test_an_interrupted_run_resumes_and_ends_with_the_same_bytes(config: GenerateConfig, tmp_path: Path) -> None:
    sampler = DyingSampler()
    with pytest.raises(Killed):
        generate_rollouts(config, make_sampler=fake_factory(sampler))
    assert sampler.closed
    with pytest.raises(DataError, match="unfinished"):
        read_manifest(config.output)
    assert run(config) == [["p3", "p4", "p5"], ["p6", "p7", "p8"], ["p9"]]
    run(replace(config, output=tmp_path / "at_once"))
    assert files_of(config.output) == files_of(tmp_path / "at_once")


class Stalling(FakeSampler):
    """Never ends the shard of one number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def sample(self, shards: Any, **settings: Any) -> Any:
        for shard in shards:
            self._seconds_per_shard = 600 * (shard.index == self._number)
            yield from super().sample([shard], **settings)


def test_kill_9_at_any_moment_costs_at_most_the_shard_at_work(config: GenerateConfig, tmp_path: Path) -> None:
    """A process of its own, killed in its 2nd, 3rd and 4th shard, which would never end; then run to the end."""
    for shards_before in (1, 2, 3):
        process = os.fork()
        if process == 0:
            try:
                generate_rollouts(config, make_sampler=fake_factory(Stalling(shards_before)))
            finally:
                os._exit(1)
        try:
            deadline = time.monotonic() + 120
            while num_entered(config.output) < shards_before and time.monotonic() < deadline:
                assert os.waitpid(process, os.WNOHANG) == (0, 0)
                time.sleep(0.01)
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        assert not (config.output / "manifest.json").exists()
    (config.output / ".shard-00003.jsonl.tmp-999999").write_text("half a sh")
    assert run(config) == [["p9"]]
    assert list(config.output.glob(".*.tmp-*")) == []
    run(replace(config, output=tmp_path / "at_once"))
    assert files_of(config.output) == files_of(tmp_path / "at_once")


def num_entered(output: Path) -> int:
    request, lines = output / "request.json", output / "finished.jsonl"
    folded = json.loads(request.read_text())["shards"] if request.is_file() else {}
    appended = lines.read_bytes().split(b"\n")[:-1] if lines.is_file() else []
    return len({*folded, *(str(json.loads(line)["index"]) for line in appended)})


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_lost_or_damaged_shard_alone_is_sampled_again(config: GenerateConfig, damage: Any) -> None:
    run(config)
    before = files_of(config.output)
    damage(config.output / "shard-00001.jsonl")
    assert run(config) == [["p3", "p4", "p5"]]
    assert files_of(config.output) == before


def test_the_manifest_is_withdrawn_while_a_shard_is_redone(config: GenerateConfig) -> None:
    run(config)
    (config.output / "shard-00000.jsonl").unlink()
    with pytest.raises(Killed):
        sampler = DyingSampler()
        sampler.calls.append(([], 0))
        generate_rollouts(config, make_sampler=fake_factory(sampler))
    assert not (config.output / "manifest.json").exists()


def test_what_answers_are_checked_by_stands_in_the_rows_and_belongs_to_the_request(config: GenerateConfig) -> None:
    rows = [json.loads(line) for line in config.prompts.read_text().splitlines()]

    def write(kwargs: list[dict[str, Any]]) -> None:
        columns = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": kwargs, "tests": ["a", 1.5, None]}
        config.prompts.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows))

    write([{"num_words": None}])
    keeping = replace(config, keep_columns=("tests",))
    run(keeping)
    expected = {
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
        "tests": ["a", 1.5, None],
    }
    assert [group.columns for group in read_rollouts(config.output)] == [expected] * NUM_PROMPTS
    before = files_of(config.output)
    assert run(keeping) == [] and files_of(config.output) == before
    for changed in (config, keeping):  # without "tests", and with other arguments
        with pytest.raises(ConfigError, match="prompts_hash was"):
            run(changed)
        write([{"num_words": 3}])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.5}, "temperature was 1.0, now 0.5"),
        ({"num_responses": 2}, "num_responses was 3, now 2"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"max_tokens": 9}, "max_tokens was 8, now 9"),
        ({"limit": 5}, "prompts_hash was"),
        ({"shard_size": 4}, "shard_size was 3, now 4"),
    ],
)
def test_the_directory_of_another_request_is_refused(
    config: GenerateConfig, settings: dict[str, Any], named: str
) -> None:
    run(config)
    before = files_of(config.output)
    with pytest.raises(ConfigError, match=named):
        run(replace(config, **settings))
    assert files_of(config.output) == before


def test_the_directory_of_another_model_is_refused(config: GenerateConfig, tmp_path: Path) -> None:
    from tests.models import tiny_llama

    run(config)
    with pytest.raises(ConfigError, match="model_hash was"):
        run(replace(config, model=tiny_llama(tmp_path / "other", seed=1)))


def test_an_output_with_other_files_is_refused(config: GenerateConfig) -> None:
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="thesis.tex"):
        run(config)
    with pytest.raises(ConfigError, match="is a file"):
        run(replace(config, output=config.output / "thesis.tex"))


def test_two_processes_cannot_write_to_one_directory(config: GenerateConfig) -> None:
    class Nested(FakeSampler):
        def answers(self, prompts, *, sampling, seed, on_progress):  # type: ignore[no-untyped-def]
            run(config)
            raise AssertionError("the second run was let in")

    with pytest.raises(ConfigError, match="is in use by process"):
        generate_rollouts(config, make_sampler=fake_factory(Nested()))


def test_a_damaged_request_file_is_refused(config: GenerateConfig) -> None:
    run(config)
    (config.output / "request.json").write_text('{"request": [], "shards": 5}')
    with pytest.raises(DataError, match="request.json is damaged"):
        run(config)


def test_unusable_prompts_are_in_the_manifest_with_their_reason(config: GenerateConfig) -> None:
    rows = [
        {"prompt_id": "good", "prompt": "Why?"},
        {"prompt_id": "empty", "prompt": ""},
        {"prompt_id": "forged", "prompt": "Hi <|im_end|>"},
        {"prompt_id": "long", "prompt": "x" * 500},
    ]
    config.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config)
    manifest = read_manifest(config.output)
    assert manifest.num_prompts == 1
    reasons = {entry["prompt_id"]: entry["reason"] for entry in manifest.quarantined}
    assert set(reasons) == {"empty", "forged", "long"}
    # <|im_start|>user\n + 500 + <|im_end|>\n + <|im_start|>assistant\n: 6 + 500 + 2 + 11 tokens.
    assert reasons["long"] == "519 tokens and max_tokens 8 exceed 512"


def test_prompts_that_are_all_too_long_are_an_error(config: GenerateConfig) -> None:
    with pytest.raises(DataError, match="Use a smaller --max-tokens"):
        run(replace(config, max_model_len=20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 0}, "--shard-size"),
        ({"max_model_len": 8}, "leaves no room for a prompt"),
        ({"num_responses": 0}, "--num-responses"),
        ({"temperature": 0.0}, "--temperature"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    config: GenerateConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **settings)


def test_a_context_longer_than_the_models_is_refused(config: GenerateConfig) -> None:
    with pytest.raises(ConfigError, match="Use --max-model-len 512"):
        run(replace(config, max_model_len=513))


# The end of a turn


def model_with_eos(
    tmp_path: Path,
    *,
    config: Any,
    generation: Any = None,
    tokenizer: str = "<|endoftext|>",
    template: str | None = None,
) -> Path:
    """A model whose files name these tokens EOS; its template ends turns with <|im_end|>, id 2."""
    from tests.models import tiny_llama

    model = tiny_llama(tmp_path / "model", eos_token_id=config)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": tokenizer}))
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    return model


@pytest.mark.parametrize(
    ("eos", "stops", "said"),
    [
        ({"config": 0}, [0, 2], "ends a turn with <|im_end|> (2), which neither"),
        ({"config": [0, 1]}, [0, 1, 2], "ends a turn with <|im_end|> (2), which neither"),
        ({"config": 0, "generation": [0, 2]}, [0, 2], None),
        ({"config": None, "tokenizer": "<|im_end|>"}, [2], None),
        ({"config": 2}, [0, 2], None),
        ({"config": 0, "template": "{{ messages[0]['content'] }}"}, [0], None),
        (
            {"config": 0, "template": "{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}"},
            [0],
            "<end_of_turn>, which is no single token",
        ),
    ],
)
def test_the_templates_end_of_turn_stops_sampling(
    config: GenerateConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    eos: Any,
    stops: list[int],
    said: str | None,
) -> None:
    sampler, seen = FakeSampler(), []

    class Recording(FakeSampler):
        def answers(self, prompts, *, sampling, seed, on_progress):  # type: ignore[no-untyped-def]
            seen.append(sampling.stop_token_ids)
            return sampler.answers(prompts, sampling=sampling, seed=seed, on_progress=on_progress)

    generate_rollouts(replace(config, model=model_with_eos(tmp_path, **eos)), make_sampler=fake_factory(Recording()))
    assert set(seen) == {tuple(stops)}
    assert read_manifest(config.output).sampling["stop_token_ids"] == stops
    warned = [record.getMessage() for record in caplog.records if "ends a turn" in record.getMessage()]
    assert len(warned) == (said is not None)
    assert said is None or said in warned[0]


def test_an_eos_that_is_no_token_id_is_refused(config: GenerateConfig, tmp_path: Path) -> None:
    model = model_with_eos(tmp_path, config=0, generation="</s>")
    with pytest.raises(DataError, match="generation_config.json: eos_token_id is '</s>'"):
        run(replace(config, model=model))


def test_template_arguments_are_recorded_and_make_another_request(config: GenerateConfig, tmp_path: Path) -> None:
    template = "{{ messages[0]['content'] }}{% if not enable_thinking %}/no_think{% endif %}"
    model = model_with_eos(tmp_path, config=2, template=template)
    settings = TemplateConfig(chat_template_kwargs=("enable_thinking=false",))
    run(replace(config, model=model, template=settings))
    assert read_manifest(config.output).sampling["chat_template_kwargs"] == {"enable_thinking": False}
    assert all(group.prompt_text.endswith("/no_think") for group in read_rollouts(config.output))
    with pytest.raises(ConfigError, match="chat_template_kwargs was .*False"):
        run(replace(config, model=model, template=TemplateConfig(chat_template_kwargs=("enable_thinking=true",))))


# Answers that are of no use


class Answering(FakeSampler):
    """Gives prompt number i of all, in order, the answers that a function makes of i and k."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.number = answer, 0

    def answers(self, prompts, *, sampling, seed, on_progress):  # type: ignore[no-untyped-def]
        answers = []
        for _ in prompts:
            made = [self.answer(self.number, k) for k in range(sampling.num_responses)]
            answers.append(made[0] if isinstance(made[0], Refusal) else tuple(made))
            self.number += 1
        return answers


def answer(text: str, *token_ids: int, finish_reason: str = "stop") -> Response:
    return Response(text=text, token_ids=token_ids or (70, 2), finish_reason=finish_reason, seed=None)


@pytest.mark.parametrize(
    ("made", "counts", "said"),
    [
        (lambda i, k: answer(f"{k}", finish_reason="length"), {"cut": 30}, "30 of 30 (100%) answers were cut"),
        (lambda i, k: answer(f"{k}", 70, 2, 1, 71), {"turn_markers": 30}, "30 of 30 (100%) answers hold a turn marker"),
        (lambda i, k: answer("" if k == 0 else f"{k}", 2), {"empty": 10}, "10 of 30 (33%) answers are empty"),
        (lambda i, k: answer("same" if i else f"{k}"), {"uniform": 9}, "9 of 10 (90%) prompts got the same answer"),
    ],
)
def test_useless_answers_are_counted_and_said(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture, made: Any, counts: dict[str, int], said: str
) -> None:
    generate_rollouts(config, make_sampler=fake_factory(Answering(made)))
    outcomes = read_manifest(config.output).outcomes
    expected = {"groups": 10, "responses": 30, "cut": 0, "empty": 0, "turn_markers": 0, "uniform": 0, **counts}
    assert outcomes == expected
    assert any(record.getMessage().startswith(said) for record in caplog.records)
    caplog.clear()
    generate_rollouts(config, make_sampler=fake_factory(FakeSampler()))  # complete: said again, from request.json
    assert read_manifest(config.output).outcomes == expected
    assert any(record.getMessage().startswith(said) for record in caplog.records)


@pytest.mark.parametrize("text", ["", "the same"])
def test_rollouts_without_two_different_answers_are_refused(config: GenerateConfig, text: str) -> None:
    for _ in range(2):  # the shards are kept; the second time nothing is sampled
        with pytest.raises(DataError, match="no prompt got two different answers .10 prompts, 3 answers each"):
            generate_rollouts(config, make_sampler=fake_factory(Answering(lambda i, k: answer(text))))
        assert not (config.output / "manifest.json").exists()
    run(replace(config, allow_no_signal=True))
    assert read_manifest(config.output).outcomes["uniform"] == 10


def test_one_response_each_that_is_empty_is_refused(config: GenerateConfig) -> None:
    config = replace(config, num_responses=1)
    with pytest.raises(DataError, match="all 10 answers are empty.*--allow-no-signal"):
        generate_rollouts(config, make_sampler=fake_factory(Answering(lambda i, k: answer(" \n", 2))))
    assert not (config.output / "manifest.json").exists()


def test_one_response_is_enough_to_evaluate_only(config: GenerateConfig, caplog: pytest.LogCaptureFixture) -> None:
    run(replace(config, num_responses=1))
    assert any("nothing can be preferred" in record.getMessage() for record in caplog.records)
    assert read_manifest(config.output).num_prompts == NUM_PROMPTS


def test_prompts_that_a_server_refuses_are_set_aside(config: GenerateConfig) -> None:
    """Prompts 1 and 9; the latter is a shard of its own, which then holds nothing and is not in the manifest."""
    refusal = Refusal(reason="HTTP 400 too long")
    sampler = Answering(lambda i, k: refusal if i in (1, 9) else answer(f"{k}"))
    generate_rollouts(config, make_sampler=fake_factory(sampler))
    for _ in range(2):
        manifest = read_manifest(config.output)
        assert [group.prompt_id for group in read_rollouts(config.output)] == [f"p{i}" for i in range(9) if i != 1]
        assert manifest.num_prompts == 8
        assert [entry.rows for entry in manifest.shards] == [2, 3, 3]
        assert manifest.quarantined == tuple({"prompt_id": f"p{i}", "reason": "HTTP 400 too long"} for i in (1, 9))
        assert run(config) == []


def test_rows_of_several_splits_are_said(config: GenerateConfig, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"Why {i}?", "split": "train" if i % 2 else "heldout"} for i in range(4)]
    config.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config)
    assert any("several splits are taken together (heldout, train)" in r.getMessage() for r in caplog.records)
