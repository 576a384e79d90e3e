"""What a judge reads beside the responses."""

import pytest

from megatron_sppo.judge.source import UnreadableGroup, last_user_message, pairrm_texts
from tests.unit.judge.groups import group_of


def test_one_turn_is_the_plain_user_message() -> None:
    group = group_of("None of this is cut: why?", ["a", "b"], prompt_text="<templated>")
    assert pairrm_texts(group, reads="message") == ("None of this is cut: why?", ["a", "b"])


def test_the_official_preset_reads_the_templated_prompt() -> None:
    group = group_of("question", ["a"], prompt_text="<|im_start|>user\nquestion<|im_end|>\n")
    assert pairrm_texts(group, reads="template") == ("<|im_start|>user\nquestion<|im_end|>\n", ["a"])


def test_the_official_preset_without_a_templated_prompt_is_refused() -> None:
    with pytest.raises(UnreadableGroup, match="--preset paper"):
        pairrm_texts(group_of("question", ["a"]), reads="template")


def test_several_turns_take_llm_blenders_conversation_form() -> None:
    """The expected texts are llm_blender 0.0.2's Blender.compare_conversations, written out by hand."""
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Count."},
    ]
    source, candidates = pairrm_texts(group_of(turns, ["1", "2"]), reads="message")
    assert source == (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
        "USER: Hello\nAssistant: <Response 1>\nUSER: Count.\nAssistant: <Response 2>"
    )
    assert candidates == ["<Response 1>: Hi.\n<Response 2>: 1", "<Response 1>: Hi.\n<Response 2>: 2"]


def test_a_system_message_goes_before_the_users_words() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert pairrm_texts(group_of(turns, ["a"]), reads="message")[0] == "Be brief.\nWhy?"


def test_the_last_user_message_is_found_behind_an_answer() -> None:
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}]
    assert last_user_message(turns) == "first"
    assert last_user_message([{"role": "system", "content": "x"}]) == ""
