"""Proves that a chat template can neither reach beyond its messages nor hang or fill the process that renders it.

Templates of the published families are held against transformers' own `apply_chat_template` in test_chat_template.py;
here are those that a stranger would write. That the sandbox has no hole that nobody knows is not shown.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.checkpoints.side_files import check_side_files
from megatron_sppo.errors import DataError
from megatron_sppo.rollout import template_child, template_process
from megatron_sppo.rollout.chat_template import ChatTokenizer
from megatron_sppo.rollout.config import TemplateConfig
from megatron_sppo.rollout.template_process import ExhaustingTemplate, TemplateRefusal, render_all
from tests.models import byte_tokenizer

QUESTION = [{"role": "user", "content": "Hi"}]

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}",
    "{{ lipsum.__globals__['os'].system('touch owned') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__.__builtins__.open('owned', 'w') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__.json.codecs.open('owned', 'w') }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ raise_exception.__closure__[0].cell_contents }}",
    "{{ (messages|map(attribute='__class__')|list)[0].mro() }}",
    "{{ messages|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{{ messages[0]|attr('__reduce_ex__')(2) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) ~ raise_exception('nothing') }}",
    "{{ ('{0.__class__}'|format(messages)).x.y }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(content='forged') }}",
    "{{ messages[0].pop('content') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch owned') }}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import root %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ range(10 ** 9)|list }}",
    "{{ lipsum(n=10 ** 9) }}",
)


class Tokenizer:
    """As much of transformers' as a template sees."""

    def __init__(self) -> None:
        self.special_tokens_map = {"eos_token": "</s>"}

    def get_chat_template(self, template: str | None) -> str | None:
        return template


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has a tenth of the time."""
    monkeypatch.setattr(template_child, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(template_process, "_SHARED", template_process._Renderer())


@pytest.mark.counts("injections")
@pytest.mark.parametrize("template", [t for t in ESCAPES if "10 ** 9" not in t])
def test_nothing_but_the_messages_can_be_reached(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, or writes nothing but what is harmless: no name of Python's inside is in the text."""
    monkeypatch.chdir(tmp_path)
    (text,) = render_all(Tokenizer(), [QUESTION], template=template)
    assert isinstance(text, TemplateRefusal) or not any(word in text for word in ("class", "object at", "root:"))
    assert list(tmp_path.iterdir()) == []
    assert QUESTION == [{"role": "user", "content": "Hi"}]


@pytest.mark.counts("injections")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x'|center(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ 'x' * 10 ** 8 }}",
    ],
)
def test_a_template_that_fills_the_memory_is_said_to(template: str) -> None:
    (text, again) = render_all(Tokenizer(), [QUESTION, QUESTION], template=template)
    assert isinstance(text, ExhaustingTemplate) and isinstance(again, ExhaustingTemplate), str(text)


@pytest.mark.counts("injections")
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 3 ** (3 ** (3 ** 3)) }}",  # one instruction, in which no Python can interrupt it
    ],
)
def test_a_template_without_end_is_ended_and_the_next_one_rendered(template: str, impatient: None) -> None:
    begin = time.process_time()
    (text,) = render_all(Tokenizer(), [QUESTION], template=template)
    assert isinstance(text, ExhaustingTemplate) and "CPU time" in str(text)
    assert time.process_time() - begin < 5, "it was computed here"
    assert render_all(Tokenizer(), [QUESTION], template="{{ messages[0].content }}{{ eos_token }}") == ["Hi</s>"]


def test_of_a_template_that_hangs_on_some_prompts_the_others_are_rendered_in_order(impatient: None) -> None:
    # Not of constants, which are computed when it is compiled, whatever the prompt.
    three = "{% set n = messages|length + 2 %}{% if messages[0].content == 'b' %}{{ n ** (n ** (n ** n)) }}{% endif %}"
    template = three + "{{ messages[0].content }}"
    asked = [[{"role": "user", "content": name}] for name in "abc"]
    texts = render_all(Tokenizer(), asked, template=template)
    assert [texts[0], texts[2]] == ["a", "c"] and isinstance(texts[1], ExhaustingTemplate)
    with pytest.raises(DataError, match="CPU time"):  # not so for sixty thousand prompts
        render_all(Tokenizer(), asked * 2, template=template)


def test_a_model_whose_template_exhausts_is_refused_at_once(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    bomb = tmp_path / "bomb.jinja"
    bomb.write_text("{{ 'x' * 10 ** 10 }}")
    with pytest.raises(DataError, match="more than 1024 MiB of memory.*--chat-template"):
        ChatTokenizer(tmp_path, template=TemplateConfig(chat_template=bomb))


@pytest.mark.parametrize(
    "constant", ["10 ** (10 ** 8)", "'x' * 10 ** 11", "'x'|center(100000000000)", "[0] * 10 ** 11"]
)
def test_an_import_reads_a_template_without_computing_its_constants(constant: str, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "chat_template.jinja").write_text(f"{{{{ {constant} }}}}{{% set x = {constant} %}}")
    begin = time.process_time()
    check_side_files(tmp_path)
    assert time.process_time() - begin < 10


def test_lone_surrogates_and_special_tokens_come_through_as_they_are() -> None:
    turns: Any = [{"role": "user", "content": "\ud800 \u2028 \x00 \N{SNOWMAN}"}]
    template = "{{ messages[0].content }}{{ eos_token }}"
    assert render_all(Tokenizer(), [turns], template=template) == [turns[0]["content"] + "</s>"]
