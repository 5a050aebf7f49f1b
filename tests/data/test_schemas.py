from __future__ import annotations

from typing import Any

import pytest

from gipo_megatron.data.examples import BadRow, Example, Tally, Turn
from gipo_megatron.data.schemas import Schema, split_common, transcript_turns
from gipo_megatron.errors import UserError
from tests.data.fixtures import dialogue

USER = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
HI = (Turn("user", "hi"),)


def read(format: str, row: dict[str, Any], **columns: str) -> Example:
    return Schema(format, columns, [row], "here").read(row, "s", Tally(), "here")


def read_pair(chosen: Any, rejected: Any) -> Example:
    """Under a schema that a good transcript has settled."""
    good = {"chosen": dialogue("h: q", "a: x"), "rejected": dialogue("h: q", "a: y")}
    return Schema("preference", {}, [good], "here").read(
        {"chosen": chosen, "rejected": rejected}, "s", Tally(), "here"
    )


@pytest.mark.parametrize(
    ("format", "row", "style", "prompt", "responses"),
    [
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            "text",
            (Turn("text", "p"),),
            ("a", "b"),
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            "messages",
            HI,
            ("good", "bad"),
        ),
        (
            "preference",
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "messages",
            HI,
            ("good", "bad"),
        ),
        (
            "preference",
            {"chosen": "the sky is blue", "rejected": "the sky is black"},
            "text",
            (Turn("text", "the sky is"),),
            (" blue", " black"),
        ),
        ("prompt", {"prompt": "p"}, "text", (Turn("text", "p"),), ()),
        ("prompt", {"prompt": [USER]}, "messages", HI, ()),
        ("prompt", {"messages": [USER, GOOD]}, "messages", HI, ()),
        ("sft", {"prompt": "p", "completion": "c"}, "text", (Turn("text", "p"),), ("c",)),
        ("sft", {"prompt": [USER], "completion": [GOOD]}, "messages", HI, ("good",)),
        ("sft", {"messages": [USER, GOOD]}, "messages", HI, ("good",)),
    ],
)
def test_standard_and_conversational_schemas(
    format: str, row: dict[str, Any], style: str, prompt: Any, responses: Any
) -> None:
    example = read(format, row)
    assert (example.style, example.prompt, example.responses) == (style, prompt, responses)


def test_columns_map_our_names_to_the_files() -> None:
    row = {"q": "p", "win": "a", "lose": "b", "where": "west", "stars": 4, "notes": ["x"]}
    example = read("preference", row, prompt="q", chosen="win", rejected="lose", source="where")
    assert (example.prompt[0].text, example.responses, example.source) == ("p", ("a", "b"), "west")
    assert example.extras == {"stars": 4}


def test_a_missing_column_names_those_found() -> None:
    with pytest.raises(
        UserError, match=r"needs the columns chosen \+ rejected; found: prompt, best, worst"
    ):
        Schema("preference", {}, [{"prompt": "p", "best": "a", "worst": "b"}], "here")
    with pytest.raises(UserError, match=r"no column 'label'; found: prompt, response"):
        Schema("sft", {"response": "label"}, [{"prompt": "p", "response": "a"}], "here")
    with pytest.raises(UserError, match="unknown name 'answer'"):
        Schema("sft", {"answer": "label"}, [{"prompt": "p", "label": "a"}], "here")


def test_a_transcript_keeps_its_letters() -> None:
    """Two leading spaces, a foreign head, a role inside a turn, the same role twice, an empty
    turn."""
    prompt = (
        "\n\nHuman:  two\n\nAssistant: say Human: or\nAssistant: x\n\nAssistant:"
        " again\n\nHuman:\n\nHumans: head\n\nAssistant:"
    )
    example = read_pair(prompt + "  x", prompt + " y")
    assert example.responses == ("  x", " y")
    heads = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
    assert (
        "".join(heads[turn.role] + turn.text for turn in example.prompt) + "\n\nAssistant:"
        == prompt
    )
    assert [turn.role for turn in example.prompt] == ["user", "assistant", "assistant", "user"]
    assert example.prompt[1].text == " say Human: or\nAssistant: x"


def test_text_before_the_first_head_is_kept() -> None:
    assert transcript_turns("Rules.\n\nHuman: q\n\nAssistant:") == (
        Turn("text", "Rules."),
        Turn("user", " q"),
    )


SHORT, LONG = dialogue("h: q", "a: x"), dialogue("h: q", "a: x", "h: r", "a: y")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: q\n\nAssistant:", SHORT, "empty response"),
        (SHORT, "\n\nHuman: q\n\nAssistant: ", "empty response"),
        (SHORT, dialogue("h: other", "a: x"), "chosen and rejected have different prompts"),
        (SHORT, LONG, "chosen and rejected have different prompts"),
        (SHORT, SHORT, "chosen equals rejected"),
        (SHORT, SHORT + " ", "chosen equals rejected"),
        ("\n\nHuman: q", SHORT, "no Assistant turn"),
        (dialogue("h: q", "a: x", "h: r"), SHORT, "the last turn is the human's"),
        (None, SHORT, "no value for chosen"),
        (SHORT, 7, "rejected is neither text nor a chat, but int"),
        (
            "\n\nHuman: \ud800q\n\nAssistant: x",
            "\n\nHuman: \ud800q\n\nAssistant: y",
            "not valid Unicode (a lone surrogate)",
        ),
        ("\n\nAssistant: a\n\nAssistant: x", "\n\nAssistant: a\n\nAssistant: y", "no human turn"),
        ("\n\nHuman: \n\nAssistant: x", "\n\nHuman: \n\nAssistant: y", "no human turn"),
    ],
)
def test_bad_transcripts(chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        read_pair(chosen, rejected)
    assert str(raised.value) == reason


def test_transcripts_that_look_odd_and_are_good() -> None:
    """One a prefix of the other, one character, control characters."""
    assert read_pair(SHORT, SHORT + " more").responses == (" x", " x more")
    assert read_pair(
        dialogue("h: q\x00\x1b", "a: x"), dialogue("h: q\x00\x1b", "a: \x07")
    ).responses == (" x", " \x07")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, "the last turn is not the assistant's"),
        (
            {"messages": [{"role": "tool", "content": "x"}, GOOD]},
            "the role 'tool' is none of system, user, assistant, human, gpt",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "a message without text content",
        ),
        ({"messages": ["x"]}, "a message without text content"),
        ({"messages": []}, "no value for messages"),
        ({"messages": [GOOD]}, "no human turn"),
    ],
)
def test_bad_messages(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        read("sft", row)
    assert str(raised.value) == reason


def test_a_response_of_several_turns() -> None:
    with pytest.raises(BadRow, match="more than one turn"):
        read("preference", {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]})


def test_a_literal_end_mark_is_removed_and_counted() -> None:
    row = {"prompt": "p", "response": " summary<|endoftext|>\n"}
    tally = Tally()
    assert Schema("sft", {}, [row], "here").read(row, "s", tally, "line 1").responses == (
        " summary",
    )
    assert list(tally.changed.values()) == [1] and list(tally.first.values()) == ["line 1"]


def test_an_implicit_prompt_never_splits_a_word() -> None:
    assert split_common("a b cd", "a b ce") == ("a b", " cd", " ce")
    assert split_common("xy", "xz") == ("", "xy", "xz")
    assert split_common("a b", "a b c") == ("a", " b", " b c")
