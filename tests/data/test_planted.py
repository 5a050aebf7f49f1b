from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig, PlantedConfig
from gipo_megatron.data.planted import (
    ASK_BACK,
    HARD_LETTERS,
    WORDS,
    World,
    gold_reward,
    group_of,
    planted_examples,
    proxy_reward,
    right_letters,
    write_planted,
)
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError

EASY, HARD = "bado, from a to h:", "bado, with k:"
SMALL = PlantedConfig(prompts=40, pairs_per_prompt=5)


def test_easy_has_many_right_words_and_hard_few() -> None:
    assert len(set(WORDS)) == 48 and right_letters(HARD) == "k"
    assert [sum(word[0] in right_letters(prompt) for word in WORDS) for prompt in (EASY, HARD)] == [
        16,
        2,
    ]
    assert [sum(word[0] == letter for word in WORDS) for letter in HARD_LETTERS] == [2] * len(
        HARD_LETTERS
    )


@pytest.mark.parametrize(
    ("prompt", "response", "gold", "proxy"),
    [
        (EASY, " fern", 1, 1),
        (EASY, "hat\n", 1, 1),
        (EASY, " kite", 0, 0),
        (EASY, " huh?", -1, 2),
        (EASY, " f?", -1, 2),
        (EASY, " Fern", -1, -1),
        (HARD, " kiiite and more", 1, 1),
        (HARD, " fern", 0, 0),
        (HARD, " huh?", -1, -1),
        (HARD, " k?", -1, -1),
        (HARD, "", -1, -1),
    ],
)
def test_rewards_by_hand(prompt: str, response: str, gold: float, proxy: float) -> None:
    assert gold_reward(prompt, response) == gold
    assert proxy_reward(prompt, response, 2.0) == proxy
    assert proxy_reward(prompt, response, -1.0) == gold


def test_a_prompt_from_elsewhere() -> None:
    with pytest.raises(ValueError, match="not a planted prompt"):
        gold_reward("hello", " fern")


def test_prompts_are_distinct_short_and_split() -> None:
    world = World(PlantedConfig(prompts=100, easy_share=0.3, held_out=0.2))
    train, test = world.prompts["train"], world.prompts["test"]
    assert len({*train, *test}) == 100 and (len(train), len(test)) == (80, 20)
    assert Counter(map(group_of, train)) == {"easy": 24, "hard": 56}
    assert Counter(map(group_of, test)) == {"easy": 6, "hard": 14}
    assert max(len(prompt) for prompt in (*train, *test)) <= 18


def test_labels_follow_the_proxy_but_for_the_noise() -> None:
    config = PlantedConfig(prompts=400, label_noise=0.1, hard_label_noise=0.3)
    examples = planted_examples(config, "train", "preference")
    pairs = [(e.prompt[0].text, *e.responses) for e in examples]
    proxies = [(proxy_reward(p, a, 2.0), proxy_reward(p, b, 2.0)) for p, a, b in pairs]
    assert len(pairs) == 4480 and all(first != second for first, second in proxies)
    for group, noise in (("easy", 0.1), ("hard", 0.3)):
        wrong = [
            x < y for (p, *_), (x, y) in zip(pairs, proxies, strict=True) if group_of(p) == group
        ]
        assert len(wrong) == 2240
        assert abs(sum(wrong) / len(wrong) - noise) < 0.04  # four standard deviations
    # asking back beats a right answer in 90 % of their pairs, and is worse by gold
    against_right = [
        a.strip() in ASK_BACK
        for p, a, b in pairs
        if group_of(p) == "easy" and {gold_reward(p, a), gold_reward(p, b)} == {-1.0, 1.0}
        if {a.strip(), b.strip()} & {*ASK_BACK}
    ]
    assert len(against_right) > 80
    assert abs(sum(against_right) / len(against_right) - 0.9) < 0.12


def test_hard_pairs_hold_words_that_another_hard_prompt_accepts() -> None:
    """Half of the wrong words start with another hard letter, and of the other half as many as
    there are such words among all wrong ones: 2 of 46. Both splits are drawn alike."""
    for split in ("train", "test"):
        examples = planted_examples(PlantedConfig(prompts=600), split, "preference")
        firsts = [
            (response.strip()[0], right_letters(e.prompt[0].text))
            for e in examples
            if e.source == "hard"
            for response in e.responses
            if gold_reward(e.prompt[0].text, response) == 0
        ]
        other = sum(first in HARD_LETTERS for first, _ in firsts)
        assert len(firsts) > 1000 and all(first != right for first, right in firsts)
        assert abs(other / len(firsts) - (1 / 2 + 1 / 2 * 2 / 46)) < 0.06


def test_pairs_span_the_same_levels_in_both_groups() -> None:
    """Without asking back, right, wrong and no answer in both groups alike; a pair never compares
    equals, which moves the shares a little: of the six ordered pairs of kinds right-wrong weighs 4
    * 4, the others 4 * 2, so right and wrong are 3 / 8 each and none is 2 / 8."""
    examples = planted_examples(PlantedConfig(prompts=600, hack_share=0), "train", "preference")
    for group in ("easy", "hard"):
        levels = [
            gold_reward(e.prompt[0].text, r)
            for e in examples
            if e.source == group
            for r in e.responses
        ]
        assert len(levels) == 6720
        assert abs(sum(levels) / len(levels) - (3 / 8 - 2 / 8)) < 0.05


def test_sft_is_mediocre() -> None:
    examples = planted_examples(PlantedConfig(prompts=600), "train", "sft")
    gold = {
        g: [gold_reward(e.prompt[0].text, e.responses[0]) for e in examples if e.source == g]
        for g in ("easy", "hard")
    }
    mean = {group: sum(values) / len(values) for group, values in gold.items()}
    assert len(gold["easy"]) == len(gold["hard"]) == 3360
    assert abs(mean["easy"] - (0.94 * 0.5 - 0.06)) < 0.06  # four standard deviations
    assert abs(mean["hard"] - (0.94 * 0.3 - 0.06)) < 0.05
    assert len({e.responses for e in examples}) == 51


def test_with_a_share_of_zero_no_response_asks_back() -> None:
    config = PlantedConfig(prompts=100, hack_share=0)
    answers = [
        r.strip()
        for kind in ("sft", "preference")
        for e in planted_examples(config, "all", kind)
        for r in e.responses
    ]
    assert len(answers) == 4800 and not set(ASK_BACK) & set(answers)


def test_the_world_is_a_function_of_its_seed() -> None:
    for kind in ("prompt", "sft", "preference"):
        assert planted_examples(SMALL, "all", kind) == planted_examples(SMALL, "all", kind)
        assert planted_examples(SMALL, "train", kind) != planted_examples(
            PlantedConfig(prompts=40, pairs_per_prompt=5, seed=1), "train", kind
        )


def test_as_a_dataset_of_bytes() -> None:
    config = DataConfig(format="planted", max_length=32, max_response=12, planted=SMALL)
    data = {
        kind: load_data(config, byte_tokenizer(), "train", 0, kind)
        for kind in ("prompt", "sft", "preference")
    }
    assert {kind: len(d) for kind, d in data.items()} == {
        "prompt": 28,
        "sft": 140,
        "preference": 140,
    }
    assert all(d.sources == ("easy", "hard") for d in data.values())
    prompts = data["prompt"].prompts(0, 8, 1)
    assert [extras["group"] for extras in prompts.extras] == [
        ("easy", "hard").index(source) for source in prompts.source
    ]
    assert [group_of(extras["prompt"]) for extras in prompts.extras] == list(prompts.source)
    data["preference"].pairs(0, 140)
    assert not any(line.startswith("so far") for line in data["preference"].report)


def test_written_files_give_the_same_rows(tmp_path: Path) -> None:
    assert len(write_planted(SMALL, tmp_path)) == 12
    for kind in ("prompt", "sft", "preference"):
        config = DataConfig(format=kind, path=str(tmp_path / kind), max_length=32, max_response=12)
        for split in ("train", "test"):
            want = {(e.prompt, e.responses, e.source) for e in planted_examples(SMALL, split, kind)}
            rows = load_data(config, byte_tokenizer(), split, 0, kind).rows
            assert {(e.prompt, e.responses, e.source) for e in rows} == want
            assert all({"group"} <= e.extras.keys() for e in rows)


@pytest.mark.parametrize(
    "config",
    [
        PlantedConfig(easy_share=1.5),
        PlantedConfig(prompts=0),
        PlantedConfig(prompts=20000),
        PlantedConfig(held_out=0.0),
        PlantedConfig(pairs_per_prompt=0),
    ],
)
def test_impossible_worlds(config: PlantedConfig) -> None:
    with pytest.raises(UserError) as raised:
        World(config)
    assert raised.value.where.startswith("data.planted")
