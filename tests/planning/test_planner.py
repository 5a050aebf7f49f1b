"""Plans of real recipes: parameter totals against Hugging Face, layouts, phases, verdicts, and what
is printed."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gipo_megatron.planning.server import Server
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Architecture, Serve
from gipo_megatron.weights.hf_config import config_for
from tests.parity.planning_cases import RECIPES
from tests.planning.conftest import PLANS, TIED, documented, shipped

GIB = 2**30


def hf_parameters(architecture: Architecture) -> int:
    """Count them with transformers; a tied output layer is the embedding."""
    config = config_for(architecture, "bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    return sum(p.numel() for p in model.parameters())


@pytest.mark.global_rng
@pytest.mark.parametrize("name", ["hh_sft", "hh_gipo", "qwen", "70b", "tiny"])
def test_parameter_totals_are_hugging_faces(plans: dict[str, Any], name: str) -> None:
    architecture = compose(PLANS[name], RECIPES).model.architecture
    whole = hf_parameters(architecture)
    found = plans[name]["parameters"]
    assert found["actor"] == whole
    if "critic" in found:  # a row of hidden_size weights in the output layer's place
        headless = (
            whole - architecture.vocab_size * architecture.hidden_size + architecture.hidden_size
        )
        assert found == {"actor": whole, "reference": whole, "critic": headless, "reward": headless}


@pytest.mark.global_rng
def test_tied_embeddings_and_padding_count_once_over_all_stages(plans: dict[str, Any]) -> None:
    """Eight layers on four stages: the last stage holds a second copy of the embedding, and 1001
    rows are padded to 1024."""
    stages = [plans[f"tied/{stage}"]["reference"] for stage in range(4)]
    assert sum(stage["parameters"] for stage in stages) == hf_parameters(TIED)
    assert [stage["chunk_layers"] for stage in stages] == [[2]] * 4
    assert stages[3]["weights"] - stages[0]["weights"] == 2 * TIED.hidden_size, (
        "the copy, and the final norm"
    )


@pytest.mark.global_rng
def test_a_base_is_the_whole_model(plans: dict[str, Any]) -> None:
    """On each of four stages, with tied embeddings, which a critic has on the first alone."""
    full, lora = ([plans[f"{name}/{i}"] for i in range(4)] for name in ("tied", "tied_lora"))
    weights = [[stage[role]["weights"] for stage in full] for role in ("reference", "reward")]
    bases = [[stage[role]["base"] for stage in lora] for role in ("reference", "reward")]
    assert bases[0] == weights[0] and bases[1][:3] == weights[1][:3]
    assert weights[1][3] - bases[1][3] == 2 * TIED.hidden_size, "the head is the role's own"
    numbers = sum(stage["actor"]["base_parameters"] for stage in lora)
    assert numbers == hf_parameters(TIED)


def test_adapters_on_one_base_take_a_fraction(plans: dict[str, Any]) -> None:
    """SmolLM2-135M, rank 16. By hand: A and B of seven matrices of each layer; the base once."""
    full, lora = plans["smollm/0"], plans["smollm/16"]
    numbers = ("weights", "gradients", "optimizer")
    states = [sum(shard[n] for shard in case.values() for n in numbers) for case in (full, lora)]
    base = max(shard["base"] for shard in lora.values())
    assert base == full["reference"]["weights"] and all(s["base"] == 0 for s in full.values())
    width, heads, keys, feed = 576, 576, 192, 1536
    sizes = [(width, heads), (width, keys), (width, keys), (heads, width), (feed, width)]
    sizes += [(width, feed), (width, feed)]
    adapters = 30 * 16 * sum(a + b for a, b in sizes)
    assert lora["actor"]["parameters"] == adapters
    assert lora["critic"]["parameters"] == adapters + width
    assert lora["reference"]["weights"] == 2 * adapters
    assert base + states[1] < 0.45 * states[0]


def test_a_7b_chain_of_adapters_on_one_gpu(plans: dict[str, Any]) -> None:
    """40.0 million parameters a role, of 18 bytes where it is trained, else 2, and 13.5 GB of base
    once. An update is two passes, without one for the gradients of frozen weights."""
    plan, base, adapters = plans["lora"], 6_738_415_616, 39_976_960
    assert plan["fits"] is True and plan["warnings"] == []
    assert plan["parameters"]["actor"] == plan["parameters"]["reference"] == adapters
    state, _, _ = plan["phases"]["actor update"]
    assert state == pytest.approx(2 * base + (2 * 18 + 2 * 2) * adapters, rel=1e-3)
    shown = "base (shared) 6,738,415,616 12.55 - - 12.55 none"
    assert shown in " ".join(plan["text"].split())
    whole = plans["hh_gipo"]
    # rollout, reward and anchor, log-probs, values, two updates
    assert plan["flops"] / plan["tokens"] == pytest.approx(2 * base * (6 + 2 * 2))
    assert whole["flops"] / whole["tokens"] == pytest.approx(2 * base * (6 + 2 * 3))


def test_groups_of_512_ranks(plans: dict[str, Any]) -> None:
    groups = plans["70b"]["groups"]
    assert {kind: (len(g), len(g[0])) for kind, g in groups.items()} == {
        "tensor": (64, 8),
        "pipeline": (64, 8),
        "data": (64, 8),
    }
    assert groups["tensor"][1] == list(range(8, 16))
    assert groups["data"][0] == list(range(0, 64, 8))
    assert groups["pipeline"][0] == list(range(0, 512, 64))
    for kind in groups.values():
        assert sorted(rank for group in kind for rank in group) == list(range(512))


def test_state_of_7b_on_eight_gpus(plans: dict[str, Any]) -> None:
    """Tensor 4, data 2, bf16: 2 + 4 bytes a parameter on each tensor rank, and 12 / 2 of fp32
    masters and moments."""
    state, _, _ = plans["hh_sft"]["phases"]["actor update"]
    assert state == pytest.approx(6_738_415_616 / 4 * (2 + 4 + 12 / 2), rel=1e-3)
    state, _, _ = plans["hh_gipo"]["phases"]["rollout"]
    assert state == pytest.approx(
        (6_738_415_616 + 6_607_347_712) / 4 * (2 + 4 + 12 / 2 + 2), rel=1e-3
    )
    assert plans["hh_gipo"]["fits"] is True


def test_phases_are_the_algorithms(plans: dict[str, Any]) -> None:
    ppo = [
        "rollout",
        "reward scores",
        "actor log-probs",
        "reference log-probs",
        "critic values",
        "critic update",
        "actor update",
        "group probe",
        "save",
    ]
    assert list(plans["hh_gipo"]["phases"])[1:] == ppo
    assert list(plans["hh_rm"]["phases"]) == ["set-up: reward", "reward update", "save"]
    assert list(plans["hh_dpo"]["phases"])[-2:] == ["actor update", "save"]
    assert list(plans["hh_dpo_live"]["phases"])[-3:] == [
        "reference log-probs",
        "actor update",
        "save",
    ]
    weights = 6_738_415_616 / 4 * 2
    more = (
        plans["hh_dpo_live"]["phases"]["actor update"][0]
        - plans["hh_dpo"]["phases"]["actor update"][0]
    )
    assert more == pytest.approx(weights, rel=1e-3), (
        "a live reference stays, a precomputed one is freed"
    )


def test_a_plugins_page_has_a_plan(plans: dict[str, Any]) -> None:
    """Twice the work of one update. Models that take turns travel for each minibatch: the reward
    model (weights and optimizer: 8 bytes a parameter) comes and the actor leaves, four times."""
    once, twice = plans["hh_sft"], plans["twice"]
    assert twice["phases"] == once["phases"] and twice["flops"] == 2 * once["flops"]
    steps = "2 epochs × 64 / 64 = 2 optimizer steps an iteration, of each model that is trained"
    assert twice["batch"][-1] == steps
    phases = plans["in_turn"]["phases"]
    assert list(phases) == [
        "set-up: actor",
        "rollout",
        "reference log-probs",
        "reward update",
        "reward scores",
        "actor update",
        "save",
    ]
    travels = 4 * (6_738_415_616 + 6_607_347_712) / 4 * 8
    assert phases["reward update"][2] == pytest.approx(travels, rel=1e-3)
    assert phases["actor update"][2] == pytest.approx(travels, rel=1e-3)


def test_offload_leaves_one_model_and_moves_the_others(plans: dict[str, Any]) -> None:
    phases = plans["hh_gipo_offload"]["phases"]
    lm, scalar = 6_738_415_616 / 4, 6_607_347_712 / 4
    assert phases["actor update"][0] == pytest.approx(lm * 12, rel=1e-3)
    assert phases["reference log-probs"][0] == pytest.approx(lm * 4, rel=1e-3), (
        "the reference's weights, and the actor's beside them"
    )
    assert phases["reward scores"][0] == pytest.approx(scalar * 2, rel=1e-3)
    # the critic (weights and optimizer: 8 bytes a parameter) leaves, the actor comes with all but
    # gradients
    assert phases["actor update"][2] == pytest.approx(scalar * 8 + lm * 8, rel=1e-3)


def test_a_save_needs_the_model_alone_on_the_device(plans: dict[str, Any]) -> None:
    """The optimizer is gathered on the host: 8 ranks, of which the first replica's 4 hold 12 bytes
    a parameter, 12 / 2 of their own share and 12 of what they receive and join; the others send 12
    / 2."""
    state, work, moved = plans["hh_gipo"]["phases"]["save"]
    assert (state, work, moved) == (plans["hh_gipo"]["phases"]["rollout"][0], 0, 0)
    lm, scalar = 6_738_415_616 / 4, 6_607_347_712 / 4
    assert plans["hh_gipo"]["saving"] == pytest.approx(
        4 * lm * (12 + 6 + 12) + 4 * lm * 6, rel=1e-3
    )
    state, work, moved = plans["hh_gipo_offload"]["phases"]["save"]
    assert (state, work) == (pytest.approx(lm * 12, rel=1e-3), 0)
    # actor and critic in turn: each comes with 8 bytes a parameter and sends the other's away; at
    # the end of an iteration the critic's weights are there
    assert moved == pytest.approx(scalar * 2 + lm * 8 + lm * 8 + scalar * 8, rel=1e-3)


def test_adam_has_temporaries_on_a_cpu_only(plans: dict[str, Any]) -> None:
    assert "  Adam  " not in plans["hh_gipo"]["text"] and "  Adam  " in plans["tiny"]["text"]


def test_flops_are_the_algorithms_passes(plans: dict[str, Any]) -> None:
    """StepResult.passes: 5 + 6 epochs for PPO (ppo.py) and 1 for the anchor; 4 for DPO with a live
    reference; 3 for the others."""
    size = 2 * 6_738_415_616
    for name, passes in (
        ("hh_gipo", 12),
        ("hh_sft", 3),
        ("hh_rm", 3),
        ("hh_dpo", 3),
        ("hh_dpo_live", 4),
    ):
        assert plans[name]["flops"] == pytest.approx(
            size * plans[name]["tokens"] * passes, rel=1e-9
        ), name
    assert plans["hh_gipo"]["tokens"] == 64 * 4 * 2048
    assert plans["hh_rm"]["tokens"] == 64 * 2 * 2048


def test_generation_takes_the_memory_that_is_left(plans: dict[str, Any]) -> None:
    """hh_gipo: 74 GiB usable, 43.5 of them models. A row of 2048 tokens is 256 MiB: 110 to 121 of
    128 rows fit, where 4 GiB hold 16.

    A full slice and a small one, 512 steps each: about 9 + 5 ms (memory, then launches), and a
    little for the prompts.
    """
    plan = plans["hh_gipo"]
    (rows,), (state, work, _) = plan["rows"], plan["phases"]["rollout"]
    left = (plan["limit"] - state) / (256 * 2**20)
    assert 0.93 * left < rows < left and 110 <= rows <= 121
    assert state + work <= plan["limit"]
    assert 7 < plan["seconds"]["rollout"] < 10
    assert plans["hh_gipo_offload"]["rows"] == [128], (
        "with all other models on the host, all rows at once"
    )
    assert plans["tiny"]["rows"] == [128], "a tiny model's caches all fit into a CPU's 4 GiB"


def test_all_stages_generate_the_same_rows(plans: dict[str, Any]) -> None:
    """Eight stages of 70B on GPUs of 24 GiB: the first and the last hold an embedding more than
    those between."""
    plan = plans["70b_small"]
    assert len(plan["rows"]) == 3 and len(set(plan["rows"])) == 1 and 1 < plan["rows"][0] < 128
    state, work, _ = plan["phases"]["rollout"]
    assert state + work <= plan["limit"]


def test_a_plan_that_does_not_fit_names_a_change_that_does(plans: dict[str, Any]) -> None:
    tight = plans["tight"]
    assert tight["fits"] is False and tight["peak"] > tight["limit"]
    assert tight["limit"] == int(40 * GIB * 0.95) - 2 * GIB
    words, peak = tight["change"]
    roles = ("actor", "reference", "critic", "reward")
    assert sorted(words) == [f"models.{role}.offload=cpu" for role in sorted(roles)]
    assert peak <= tight["limit"]
    assert plans["hopeless"]["fits"] is False and plans["hopeless"]["change"] is None
    assert plans["tiny"]["fits"] is None


def test_a_tensor_group_over_nodes_is_a_warning(plans: dict[str, Any]) -> None:
    (warning,) = plans["spanning"]["warnings"]
    assert "parallel.tensor=8 stays inside a node" in warning
    assert plans["hh_gipo"]["warnings"] == []


def test_recomputation_without_need_is_a_warning(plans: dict[str, Any]) -> None:
    """The cheapest setting that fits is named: none where it fits, else selective; nothing where
    there is nothing to gain."""
    (warning,) = plans["needless"]["warnings"]
    assert (
        "memory.recompute=full computes activations twice without need: memory.recompute=none fits,"
        " too (" in warning
    )
    needed = plans["needed"]
    (warning,) = needed["warnings"]
    assert needed["fits"] and "memory.recompute=selective fits, too (" in warning
    assert needed["limit"] < plans["hh_sft"]["peak"], "without recomputation it does not fit"


def test_shipped_recipes_fit_and_compute_nothing_twice_without_need(plans: dict[str, Any]) -> None:
    assert plans["shipped"] == {name: [True, []] for name in shipped()} and len(shipped()) == 34


def test_a_server_on_the_same_gpus_takes_its_share_in_every_phase(plans: dict[str, Any]) -> None:
    """0.2 of 80 GiB on all eight GPUs; the actor's own decoder needs nothing, a push two tensors of
    32000 × 4096 in bf16."""
    plan, plain = plans["server"], plans["hh_gipo"]
    assert plan["server"] == [16 * GIB] and plain["server"] == [0] and plan["fits"] is True
    for name, phase in plan["phases"].items():
        if name != "rollout":
            assert phase == plain["phases"][name], name
    assert plan["phases"]["rollout"][1] == 2 * 32000 * 4096 * 2
    update = plain["phases"]["actor update"]
    assert plan["worst"] == "actor update" and plan["peak"] == 16 * GIB + update[0] + update[1]
    # four tensor ranks, on the first of two pipeline stages
    assert plans["server_in_stages"]["server"] == [16 * GIB, 0]
    assert plans["server_apart"]["server"] == plans["server_elsewhere"]["server"] == [0]
    assert plans["server_cpu"]["server"] == [0]


@pytest.mark.parametrize(
    ("devices", "tensor", "expected"),
    [
        ("", 1, [True, False, True]),
        ("", 4, [True, False, True]),
        ("1,2", 2, [True, False, True]),
        (" 5 , 6", 1, [False, True, True]),
        ("3,4", 2, [True, True, True]),
        ("8,9", 2, [False, False, False]),
        ("GPU-5b0c,7", 1, [False, False, False]),
    ],
)
def test_the_ranks_beside_a_server(devices: str, tensor: int, expected: list[bool]) -> None:
    """Eight ranks on its machine, in stages of four; rank r has GPU r. Ranks 8 and on are on
    another machine."""
    serve = Serve(devices=devices, tensor_parallel=tensor, gpu_memory=0.5)
    server = Server(serve, TIED, itemsize=2, gpu=80 * GIB, longest=2048, ranks=8)
    stages = (range(4), range(4, 8))
    found = [*(server.beside(stage) == 40 * GIB for stage in stages), server.shared]
    assert found == expected
    assert server.beside(range(8, 16)) == 0


def test_a_server_fits_its_share(plans: dict[str, Any]) -> None:
    """On each of eight GPUs an eighth of 7B in bf16, 1.57 GiB, 2 GiB for CUDA, and 0.3 to 0.4 for a
    block of 8192 prompt tokens; a row of 2048 tokens is 2 × 32 layers × 4 heads × 128 × 2 bytes."""
    row = 2048 * 2 * 32 * 4 * 128 * 2
    fixed = 2 * 6_738_415_616 / 8 + 2 * GIB
    rows = [(16 * GIB - fixed - work * GIB) / row for work in (0.4, 0.2)]
    assert rows[0] < plans["server"]["server_rows"] < rows[1]
    assert "keys and values of 97 of 256 sequences" in " ".join(plans["server"]["text"].split())
    assert plans["server_apart"]["fits"] is True
    small, text = plans["server_small"], " ".join(plans["server_small"]["text"].split())
    assert small["fits"] is False and small["peak"] < small["limit"]
    assert "the server needs 4.0 GiB a GPU" in text and "0.04 gives it 3.2" in text
    assert small["change"][0] == ["algorithm.rollout.serve.gpu_memory=0.05"]


def test_a_server_beside_which_training_does_not_fit(plans: dict[str, Any]) -> None:
    """0.6 of the GPU; the largest share below it that leaves room is 0.25."""
    wide, text = plans["server_wide"], " ".join(plans["server_wide"]["text"].split())
    assert wide["fits"] is False
    assert "48.0 GiB of it are the server's: lower algorithm.rollout.serve.gpu_memory" in text
    assert "or give it GPUs of its own (algorithm.rollout.serve.devices)" in text
    words, peak = wide["change"]
    assert words == ["algorithm.rollout.serve.gpu_memory=0.25"]
    assert peak == plans["server"]["peak"] + 4 * GIB <= wide["limit"]


def test_the_time_of_a_server(plans: dict[str, Any]) -> None:
    """Prefill of 256 prompts of 1536 tokens on eight GPUs, then 512 steps of three slices: in each
    the memory is read once, or 22 kernels and two all-reduces a layer are launched."""
    parameters, row = 6_738_415_616, 2 * 32 * 4 * 128 * 2 * (2048 - 256)
    prefill = 2 * parameters * 256 * 1536 / (8 * 989e12 * 0.4)
    launched = 32 * (22 * 1.5e-6 + 2 * 20e-6)
    read = [(2 * parameters / 8 + rows * row) / 3.35e12 for rows in (97, 97, 62)]
    seconds = prefill + 512 * sum(max(each, launched) for each in read)
    assert plans["server"]["seconds"]["rollout"] == pytest.approx(seconds, rel=1e-3)
    elsewhere = " ".join(plans["server_elsewhere"]["text"].split())
    assert "rollout 7.1 - not estimated" in elsewhere
    assert "an iteration, without the rollout 84.8 0.1 24.7" in elsewhere
    (warning,) = plans["server_narrow"]["warnings"]
    assert "works on 4 of 8 GPUs" in warning and "tensor_parallel=8 makes an iteration" in warning
    assert plans["server"]["warnings"] == plans["server_apart"]["warnings"] == []


def test_the_printed_plan(plans: dict[str, Any]) -> None:
    texts = {name: plans[name]["text"] for name in PLANS}
    assert len(texts) == 26
    for name, text in texts.items():
        assert max(map(len, text.splitlines())) <= 100, name
        assert text.count("verdict: ") == 1, name
    assert "  tensor   64 of 8 ranks, inside a node: 0-7, 8-15, 16-23, …" in texts["70b"]
    step = "256 sequences an optimizer step = 8 replicas × 32 micro-batches of at most 2048 tokens"
    assert step in texts["70b"]
    assert (
        "cheapest change: models.actor.offload=cpu models.reference.offload=cpu" in texts["tight"]
    )
    assert "verdict: none, hardware.gpu_memory_gib is 0 (a CPU)" in texts["tiny"]
    assert prod((256, 4, 2048)) == plans["70b"]["tokens"]


def test_the_documents_show_the_printed_plan(plans: dict[str, Any]) -> None:
    """Whole sections, with … for those left out."""
    checked = 0
    for words, shown in documented().items():
        printed = plans[f"document/{words}"]["text"].rstrip("\n").split("\n\n")
        sections = re.sub(r"^…$", "", shown, flags=re.MULTILINE).strip("\n")
        for section in re.split(r"\n\n+", sections):
            assert section in printed, f"{words}\n{section}"
            checked += 1
    assert len(documented()) == 12 and checked == 20
