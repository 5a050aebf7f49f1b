"""The built-in tokenizer: bytes and three special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerFast


def byte_level() -> PreTrainedTokenizerFast:
    """Return byte-level BPE without merges: 256 bytes, then <pad>, <bos> and <eos>; bos stands in
    front of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<pad>", "<bos>", "<eos>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 257)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def byte_symbols() -> list[str]:
    """Return the printable character that byte-level BPE uses for each byte: the byte's own where
    it prints, else the next free one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
