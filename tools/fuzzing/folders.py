"""Folders of weights: the configuration and tokenizer of a Hugging Face model, and the metadata of
a checkpoint, of adapters and of a run."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from gipo_megatron import cli
from gipo_megatron.data.tokenizer import byte_tokenizer
from tools.fuzzing.case import Case, global_state
from tools.fuzzing.values import as_json, damaged, mutated

LAYERS, WIDTH, VOCABULARY = 2, 8, 259
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": [258],
    "pad_token_id": 256,
    "id2label": None,
    "torch_dtype": "float32",
}
GENERATION = {"bos_token_id": 257, "eos_token_id": [258, 256], "do_sample": True, "top_p": 0.9}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "model",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "up_proj"],
    "modules_to_save": None,
    "use_rslora": False,
    "bias": "none",
}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
TEMPLATES = [
    "{{",
    "{{ 1 // 0 }}",
    "",
    "{% for",
    "{{ raise_exception('x') }}",
    "x",
    "{{ messages }}",
]
INDEX = "model.safetensors.index.json"
ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{i}"}, reply]}).encode() + b"\n"
    for i in range(12)
    for reply in [{"role": "assistant", "content": "a"}]
)


def tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of CONFIG's model."""
    heads, groups = 4 * CONFIG["num_attention_heads"], 4 * CONFIG["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (WIDTH,),
            f"{at}.post_attention_layernorm.weight": (WIDTH,),
            f"{at}.self_attn.q_proj.weight": (heads, WIDTH),
            f"{at}.self_attn.k_proj.weight": (groups, WIDTH),
            f"{at}.self_attn.v_proj.weight": (groups, WIDTH),
            f"{at}.self_attn.o_proj.weight": (WIDTH, heads),
            f"{at}.mlp.gate_proj.weight": (16, WIDTH),
            f"{at}.mlp.up_proj.weight": (16, WIDTH),
            f"{at}.mlp.down_proj.weight": (WIDTH, 16),
        }
    return {name: torch.full(shape, 0.01) for name, shape in shapes.items()}


def adapters() -> dict[str, torch.Tensor]:
    """Return the tensors of ADAPTER."""
    found = {}
    for layer in range(LAYERS):
        for name, size in (("self_attn.q_proj", 8), ("mlp.up_proj", 16)):
            at = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{at}.lora_A.weight"] = torch.full((2, WIDTH), 0.01)
            found[f"{at}.lora_B.weight"] = torch.full((size, 2), 0.01)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Return {path: content} of a folder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@functools.cache
def model() -> dict[str, bytes]:
    """Return the files of a whole Hugging Face folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_tokenizer().with_chat_template(TEMPLATE)
        tokenizer.save(folder)
        files = contents(Path(folder))
    weights = save(tensors(), {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(), "model.safetensors")}
    described = {"config.json": CONFIG, "generation_config.json": GENERATION, INDEX: index}
    return {**files, "model.safetensors": weights} | {
        name: as_json(value) for name, value in described.items()
    }


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def adapted() -> dict[str, bytes]:
    """Return the files of PEFT's adapters beside their model."""
    own = {
        "adapter_config.json": as_json(ADAPTER),
        "adapter_model.safetensors": save(adapters(), {"format": "pt"}),
    }
    return below("adapters", own) | below("model", model())


@functools.cache
def checkpoint(kind: str) -> dict[str, bytes]:
    """Return the files of a checkpoint that the converter writes from `model` or `adapters`."""
    files = adapted() if kind == "adapters" else below("model", model())
    with tempfile.TemporaryDirectory() as folder, global_state(), contextlib.chdir(folder):
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content)
        words = ["convert", "from-hf", f"hf={kind}", "out=checkpoint", "verify=false"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(words) == 0
        return contents(Path("checkpoint"))


@st.composite
def changed(draw: st.DrawFn, content: bytes, text: bool = False) -> tuple[bytes, list[str]]:
    """Draw a JSON file with changed values or damaged bytes: the content, the keys at fault."""
    if text or draw(st.integers(0, 3)) == 0:
        return draw(damaged(content)), []
    value, keys = draw(mutated(json.loads(content), most=2))
    return as_json(value), keys


CHECK = ("recipe", "check", "tiny/sft", "with=model/from_weights", "models.actor.load=model")
PREPARE = ("prepare-data", "data.path=d.jsonl", "data.format=sft", "data.held_out=0.3")
CONVERT = ("convert", "from-hf", "out=out", "verify=false")


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A Hugging Face folder with a changed file: composed with, tokenised with, or converted."""
    files = dict(model())
    weighty = ["config.json"] * 6 + ["generation_config.json", INDEX]
    names = ["tokenizer_config.json"] * 4 + ["tokenizer.json", "special_tokens_map.json"]
    verb = draw(st.sampled_from([CHECK, CHECK, PREPARE, PREPARE, (*CONVERT, "hf=model")]))
    listed = {CHECK: weighty, PREPARE: names}.get(verb, weighty + names)
    name = draw(st.sampled_from([name for name in listed if name in files]))
    files[name], keys = draw(changed(files[name]))
    if verb == PREPARE:
        template = draw(st.sampled_from(["chat", "chat", "auto", "hh"]))
        verb = (*verb, "tokenizer=model", f"data.template={template}")
        if draw(st.integers(0, 3)) == 0:
            files["chat_template.jinja"] = draw(st.sampled_from(TEMPLATES)).encode()
    found = below("model", files) | {"d.jsonl": ROWS}
    return Case(verb, found, ("model", "d.jsonl", *keys), "out" if "out=out" in verb else "")


@st.composite
def checkpoints(draw: st.DrawFn) -> Case:
    """A checkpoint or adapters with changed metadata: composed with, or converted."""
    kind = draw(st.sampled_from(["model", "model", "adapters", "peft"]))
    if kind == "peft":
        files, folder = adapted(), "adapters"
        verb = (*CONVERT, "hf=adapters")
        listed = ["adapters/adapter_config.json"]
    else:
        files, folder = (
            below("checkpoint", checkpoint(kind)) | below("model", model()),
            "checkpoint",
        )
        verb = ("convert", "to-hf", "checkpoint=checkpoint", "out=out", "verify=false")
        if kind == "adapters":
            verb = (*verb, "merge=true")
        listed = [name for name in files if name.startswith("checkpoint/huggingface/")]
        listed += ["checkpoint/meta.json"] * 3 * len(listed)
    if draw(st.integers(0, 2)) == 0:
        verb = (*CHECK[:-1], f"models.actor.load={folder}")
    name = draw(st.sampled_from(listed))
    content, keys = draw(changed(files[name]))
    if name != "checkpoint/meta.json" and kind != "peft":  # meta.json records the new size
        meta = json.loads(files["checkpoint/meta.json"])
        meta["files"][name.removeprefix("checkpoint/")] = len(content)
        meta["digests"] = None
        files["checkpoint/meta.json"] = as_json(meta)
    files = {**files, name: content}
    return Case(verb, files, (folder, *keys), "out" if "out=out" in verb else "")


@st.composite
def runs(draw: st.DrawFn) -> Case:
    """A run folder with a changed file, plotted."""
    rows = [{"step": i, "train/loss": 1.0 / (i + 1), "time/step_seconds": 0.5} for i in range(6)]
    files: dict[str, Any] = {
        "environment.json": {
            "stage": "SFT",
            "headline": [["train/loss", "loss"]],
            "command": ["a"],
        },
        "recipe.yaml": {"run": {"dir": "run", "seed": 0}, "models": {}},
        "metrics.jsonl": rows,
        "alerts.jsonl": [{"step": 2, "message": "m"}],
        "samples.jsonl": [{"step": 2, "prompt": "p", "response": "r", "reward": 0.5}],
    }
    name = draw(st.sampled_from([*files]))
    value, keys = draw(mutated(files[name], most=2))
    contents = {n: _stored(n, value if n == name else files[n]) for n in files}
    if draw(st.integers(0, 2)) == 0:
        contents[name] = draw(damaged(_stored(name, files[name])))
    return Case(("plot", "run", "out=out"), below("run", contents), ("run", *keys), "out")


def _stored(name: str, value: Any) -> bytes:
    """Return a value as JSON, which is YAML, too; a list as a line for each item."""
    if name.endswith("jsonl"):
        return b"".join(as_json(row) + b"\n" for row in value)
    return as_json(value)
