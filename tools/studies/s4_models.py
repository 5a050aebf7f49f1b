"""S4's models on one mesh: recipes run as `launch/train.py` runs them, responses drawn as
`launch/evaluate.py` draws them, and scores of the gold ensemble."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gipo_megatron.components.rollout import SamplingRollout
from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import Example, Tally
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import EvaluationRecipe, compose_evaluation
from gipo_megatron.evaluation.respond import Responder, ResponseScores
from gipo_megatron.evaluation.statistics import refuses
from gipo_megatron.evaluation.tasks import LoadedTask, read_task
from gipo_megatron.evaluation.types import Response
from gipo_megatron.files import write_jsonl
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronReference, MegatronRewardModel
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.statistics import wilson_interval
from gipo_megatron.weights.sources import find_tokenizer, locate
from tools.gpu.runs import RECIPES, Rows, run
from tools.studies.s4_cells import AGAIN, START, Accuracy, Cell, Models, array

PROXY, GOLD = "rm", ("rm_gold_1", "rm_gold_2", "rm_gold_3")
PROMPTS, ALL = 600, 10**9  # test prompts, if there are so many; all that there are
QUIET = ["run.loggers=[]", "run.eval_every=0", "run.save_every=0"]
VALUE_SPLIT = "algorithm.group_classifier={name: value_split}"
# system -> its recipe and what differs from it; η follows
SYSTEMS: dict[str, list[str]] = {
    "ppo_kl": ["recipe=smollm/ppo_kl"],
    "gipo_head": ["recipe=smollm/gipo"],
    "gipo_value": ["recipe=smollm/gipo", VALUE_SPLIT],
    "adaptive": ["recipe=smollm/gipo", VALUE_SPLIT, "algorithm.variance_regulariser={name: none}"],
    "oracle": ["recipe=smollm/gipo", "algorithm.group_classifier={name: labelled}"],
    "random": ["recipe=smollm/gipo", "algorithm.group_classifier={name: random}"],
    "return_variance": [
        "recipe=smollm/gipo",
        "algorithm.group_classifier.detach_trunk=true",  # a head that is measured, never used
        "algorithm.variance_regulariser={name: return_variance}",
    ],
    "group_dro": [
        "recipe=smollm/gipo",
        VALUE_SPLIT,
        "algorithm.variance_regulariser={name: group_dro}",
    ],
}


def price(system: str, eta: float) -> str:
    kind = "group_adaptive" if system == "adaptive" else "fixed"
    return f"algorithm.kl_controller={{name: {kind}, eta: {eta}}}"


@dataclass
class Chain:
    """All runs of one seed, below `folder`. `words`: recipe keys that every run gets; with rm: or
    ppo: in front, the reward models or the policies alone."""

    mesh: Mesh
    folder: Path
    seed: int
    words: Sequence[str]
    rm_epochs: int

    # ------------------------------------------------------------------------------------- training

    def given(self, kind: str) -> list[str]:
        """Return the user's words for runs of a kind."""
        others = tuple({"rm:", "ppo:"} - {kind})
        return [word.removeprefix(kind) for word in self.words if not word.startswith(others)]

    def train(self, name: str, words: Sequence[str]) -> Rows:
        """Run a recipe to its end, or do nothing where it has ended; return what it has logged.

        Raises UserError where a signal has ended it early.
        """
        folder = self.folder / name
        rows = run(self.mesh, [*words, f"run.dir={folder}"])
        gc.collect()  # modules lie in cycles
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        if not (folder / "final").exists():
            raise UserError("interrupted", where=str(folder), fix="the same command continues")
        return rows

    def reward_model(self, name: str) -> None:
        """Train the proxy, or one member of the gold ensemble on pairs of its own part."""
        recipe = "rm" if name == PROXY else "rm_gold"
        seed = (1 + len(GOLD)) * self.seed + [PROXY, *GOLD].index(name)
        settings = [f"run.epochs={self.rm_epochs}", f"run.seed={seed}", *QUIET]
        weights = ["models.reward.load=${model.hub}", "models.reward.warmup_steps=4"]
        self.train(name, [f"recipe=smollm/{recipe}", *weights, *settings, *self.given("rm:")])

    def policy_words(self, system: str, eta: float, iterations: int) -> list[str]:
        loads = ["models.actor.load=${model.hub}", f"models.reward.load={self.final(PROXY)}"]
        settings = [f"run.steps={iterations}", f"run.seed={self.seed}"]
        words = [*SYSTEMS[system], price(system, eta), *loads, *QUIET, *settings]
        return [*words, *self.given("ppo:")]

    def policy(self, system: str, eta: float, iterations: int) -> Rows:
        """Train one system. With more iterations than before it goes on from where it was."""
        words = self.policy_words(system, eta, iterations)
        return self.train(f"{system}_{eta:g}", words)

    def final(self, name: str) -> Path:
        return self.folder / name / "final"

    # ------------------------------------------------------------------------ tokenizer and prompts

    @cached_property
    def recipe(self) -> Recipe:
        """Data, precision and sizes, which all runs share."""
        words = ["recipe=smollm/rm", "models.reward.load=${model.hub}", *self.given("rm:")]
        return compose([*words, f"run.dir={self.folder}"], RECIPES)

    @cached_property
    def start(self) -> Path:
        """The weights that every run starts from."""
        return locate(self.recipe.model.hub, "model.hub")

    @cached_property
    def tokenizer(self) -> Any:
        return find_tokenizer(self.recipe.model.tokenizer, {"model.hub": str(self.start)})

    @cached_property
    def evaluation(self) -> EvaluationRecipe:
        """Draws at temperature 1, as in training: elsewhere KL(π || reference) cannot be estimated
        from the responses."""
        data, recipe = self.recipe.data, self.recipe
        task: dict[str, Any] = {"name": "test", "kind": "helpful", "data": data.path}
        task |= {"prompts": ALL, "template": data.template, "max_length": data.max_length}
        task["source"] = list(data.source)
        policies = {name: {"load": str(self.start)} for name in (START, AGAIN)}
        generation = {"temperature": 1.0, "top_p": 1.0, "max_response": data.max_response}
        words = [
            "recipe=base/evaluate",
            f"policies={json.dumps(policies)}",
            f"tasks={json.dumps([task])}",
            f"generation={json.dumps({**generation, 'batch': 256})}",
            f"model.tokenizer={recipe.model.tokenizer}",
            f"precision.dtype={recipe.precision.dtype}",
            f"batch={json.dumps(limits(recipe))}",
            "judge={name: rule}",  # nothing is judged there
            f"run.dir={self.folder / 'evaluate'}",
        ]
        return compose_evaluation(words, RECIPES)

    @cached_property
    def task(self) -> LoadedTask:
        evaluation = self.evaluation
        length = evaluation.generation.max_response
        return read_task(evaluation.tasks[0], evaluation.data_root, self.tokenizer, length)


def limits(recipe: Recipe) -> dict[str, int | None]:
    return {name: getattr(recipe.batch, name) for name in ("micro_batch", "micro_tokens")}


def engine(chain: Chain, role: str, load: Path) -> Any:
    recipe = chain.recipe
    return build_engine(
        role,
        chain.mesh,
        recipe.model.architecture,
        recipe.precision,
        **limits(recipe),
        load=str(load),
    )


# ------------------------------------------------------------------------------------------ judging


class Judge:
    """The proxy and the gold ensemble of one seed, kept in memory, and the reference.

    A member's score of a response is the distance to its score of the data's chosen response to the
    same prompt, in units of the root mean square of its margins (chosen - rejected) on the test
    pairs. Gold is the mean over the members.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        names = (PROXY, *GOLD)
        self.models = {
            name: MegatronRewardModel(engine(chain, "reward", chain.final(name))) for name in names
        }
        self.reference = MegatronReference(engine(chain, "reference", chain.start))
        data = chain.recipe.data
        self.pairs = load_data(data, chain.tokenizer, "test", 0, "preference").rows
        self.encoder = Encoder(data, chain.tokenizer)
        chosen, rejected = (self._raw(self.pairs, place) for place in (0, 1))
        self.margins = {name: chosen[name] - rejected[name] for name in names}
        self.scale = {name: rms(margin) for name, margin in self.margins.items()}
        texts = [self.encoder.prompt(pair, row)[1] for row, pair in enumerate(self.pairs)]
        row_of = {text: row for row, text in reversed(list(enumerate(texts)))}
        # a prompt whose pair was dropped, because both responses are equal, has no anchor; of a
        # single file all prompts are read, and its held-out pairs are those that no run has seen
        usable = [prompt for prompt in chain.task.prompts if prompt.text in row_of]
        if not usable:
            raise UserError("no test prompt has a usable pair", where=data.path)
        count = min(PROMPTS, len(usable))
        self.prompts = [usable[i * len(usable) // count] for i in range(count)]
        self.places = [row_of[prompt.text] for prompt in self.prompts]
        self.anchors = {name: scores[self.places] for name, scores in chosen.items()}

    def _raw(self, rows: Sequence[Example], place: int) -> dict[str, np.ndarray]:
        """Return each model's scores of response number `place` of each row."""
        alone = [replace(row, responses=(row.responses[place],)) for row in rows]
        batch = Dataset(alone, self.encoder, 0, "sft", Tally()).answers(range(len(alone)))
        return {
            name: model.score(batch).double().cpu().numpy() for name, model in self.models.items()
        }

    def accuracies(self, seconds: float) -> Models:
        """Return how often each judge prefers the chosen response of a test pair."""
        gold = np.mean([self.margins[name] / self.scale[name] for name in GOLD], axis=0)
        device = self.chain.mesh.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        members = [accuracy(self.margins[member]).share for member in GOLD]
        proxy, seed = accuracy(self.margins[PROXY]), self.chain.seed
        return Models(seed, proxy, accuracy(gold), members, seconds, name)

    def answered(self, system: str, eta: float, load: Path, rows: Rows) -> Cell:
        """Return the cell of a policy: it responds to every test prompt, and all is scored."""
        again = system == AGAIN
        responses = self._responses(system, load, seed=int(again))
        prompts = self.prompts
        answers = [
            replace(self.pairs[place], responses=(response.text,))
            for place, response in zip(self.places, responses, strict=True)
        ]
        raw = self._raw(answers, 0)
        shown = zip(prompts, responses, strict=True)
        rows_shown = ({"prompt": p.question, "response": r.text} for p, r in shown)
        write_jsonl(self.chain.folder / "responses" / f"{system}_{eta:g}.jsonl", rows_shown)
        above = {name: (raw[name] - self.anchors[name]) / self.scale[name] for name in raw}
        coefficients = [row["kl/coef_mean"] for row in rows if row.get("kl/coef_mean") is not None]
        return Cell(
            seed=self.chain.seed,
            system=system,
            eta=eta,
            iterations=rows[-1]["step"] if rows else 0,
            price=statistics.fmean(coefficients) if coefficients else 0.0,
            prompts=[prompt.prompt_id for prompt in prompts],
            source=[prompt.source for prompt in prompts],
            gold=rounded(np.mean([above[name] for name in GOLD], axis=0)),
            proxy=rounded(above[PROXY]),
            kl=rounded(array([response.figures["kl"] for response in responses])),
            tokens=[response.tokens for response in responses],
            finished=[response.finished for response in responses],
            refuses=[refuses(response.text) for response in responses],
        )

    def _responses(self, name: str, load: Path, seed: int) -> list[Response]:
        chain = self.chain
        generation = replace(chain.evaluation.generation, seed=seed)
        weights: Mapping[str, Path] = {f"policies.{name}.load": load}
        responder = Responder(
            replace(chain.evaluation, generation=generation),
            chain.mesh, chain.tokenizer, weights, chain.task.ids, SamplingRollout(),
        )  # fmt: skip
        batches = responder.responses(
            name, chain.task.prompts, ResponseScores(None, self.reference)
        )
        return [response for batch in batches for response in batch]


def accuracy(margins: np.ndarray) -> Accuracy:
    share = float((margins > 0).mean())
    low, high = wilson_interval(share, len(margins))
    return Accuracy(share, low, high, len(margins))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def rounded(x: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in x]


def seconds_per_iteration(rows: Rows, warm: int) -> float:
    """Return the median over the iterations after the first `warm`."""
    return statistics.median(row["time/step_seconds"] for row in rows[warm:])
