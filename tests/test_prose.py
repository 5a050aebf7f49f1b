"""Plain English: first words of docstrings, verbs that only people do, one spelling per word."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("gipo_megatron", "tools", "launch", "examples", "recipes", "docs")
FILES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(
            path
            for folder in FOLDERS
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".md", ".yaml", ".j2")
        ),
    ]
)

# a docstring begins with a verb, or with the noun it describes
NO_FIRST_WORD = re.compile(
    r"(What|Who|Whose|Which|Whether|Where|When|How|Why|Here|There|It|They|That)\b"
)
# things do not speak, know or want; then words that few readers know
BANNED = re.compile(
    r"\b(says?|said|saying|(?:asks|asked|asking)(?! back)|knows|knew|tells|told|promises?|promised"
    r"|wants|wanted|talks|talked|bears|mends?|mended|mending|whoever|whomever|whatever|whichever|nobody"
    r"|somebody|anybody|anew|whence|thereof|what is there)\b",
    re.IGNORECASE,
)
AMERICAN = re.compile(
    r"\b(\w*(?:normal|initial|optim|regular|summar|organ|recogn|general|quant|serial|parallel|custom"
    r"|material|standard|penal|minim|maxim|visual|synchron|vector|token|random|emphas|stabil|util)"
    r"iz(?:e|es|ed|er|ers|ing|ation|ations)|analyz\w+|\w*colors?|behaviors?"
    r"|favors?|centers?|centered|gray|neighbors?|neighboring|labeled|labeling|modeling|modeled"
    r"|canceled|traveled|judgments?)\b",
    re.IGNORECASE,
)
# names of torch's, transformers' and Transformer Engine's parts; GIPO's own, and a paper's title
NAMES = re.compile(
    r"\w*[Tt]okeniz\w+|[Oo]ptimizers?|normalizer|quantizers?|synchronize|uninitialized"
    r"|(Optim|General)ization"
)

# sentences that keep their words: quotations, prompts for judges, phrases of data
ALLOWED = frozenset(
    {
        '"outside lower center"',  # matplotlib's word for a place
        'What can I say to him without making him angry?"',  # a user's prompt
    }
)


def chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text: of Python the strings of three words or more and the blocks of comments,
    of other files the paragraphs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = re.sub(r"```.*?```|<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        for block in re.finditer(r"(?:.*\S.*\n?)+", text):
            yield text.count("\n", 0, block.start()) + 1, block[0]
        return
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token in tokens:
        if token.type == tokenize.STRING and len(token.string.split()) >= 3:
            yield token.start[0], re.sub(r"\{[^{}]*\}", "{}", token.string)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    for _, block in groupby(enumerate(comments), lambda pair: pair[1].start[0] - pair[0]):
        lines = [token for _, token in block]
        yield lines[0].start[0], " ".join(token.string.lstrip("# ") for token in lines)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and sentence, without `code`, quoted words, names, paths and addresses."""
    for line, text in chunks(path):
        text = re.sub(r"`[^`]*`|https?://\S+|\"\w+\"|'\w+'|\S*\w[._/=]\w\S*|--\w+", " ", text)
        for sentence in re.split(r"(?<=[.;:?!]) ", " ".join(text.split())):
            yield line, sentence


def places(pattern: re.Pattern[str], allowed: re.Pattern[str] | None = None) -> list[str]:
    """Return `file:line: word: sentence` of each word of `pattern` that is not `allowed`."""
    found, read = [], 0
    for path in FILES:
        for line, sentence in sentences(path):
            read += 1
            words = [m[0] for m in pattern.finditer(sentence)]
            words = [w for w in words if allowed is None or not allowed.fullmatch(w)]
            if words and sentence not in ALLOWED:
                found.append(f"{path.relative_to(ROOT)}:{line}: {words[0]}: {sentence}")
    assert read > 3000
    return found


def report(found: list[str]) -> str:
    return f"{len(found)} places:\n" + "\n".join(found)


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    found, read = [], 0
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in FILES:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                read += text is not None
                if text and NO_FIRST_WORD.match(text):
                    line = getattr(node, "lineno", 1)
                    found.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    assert read > 800
    assert not found, report(found)


def test_things_do_not_speak() -> None:
    found = places(BANNED)
    assert not found, report(found)


def test_words_have_one_spelling() -> None:
    found = places(AMERICAN, NAMES)
    assert not found, report(found)
