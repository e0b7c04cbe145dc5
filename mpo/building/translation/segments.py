"""A text as pieces to translate and what stands between them: fenced code, list markers, blank lines and line breaks stay.

Engines that translate lines get one sentence or a few at a time, so that no piece is longer than what they were made for; chat
models get whole passages, which they understand better.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})", re.MULTILINE)
_LINE = re.compile(r"([^\r\n]*)(\r\n|\r|\n|\Z)")
# A heading, a quotation, a bullet or a number, as Markdown writes them, with the blanks around it.
_MARKER = re.compile(r"[ \t]*(?:(?:#{1,6}|>|[-*+•]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])[ \t]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?।؟…])[\"'”’)\]]*\s+|(?<=[。！？])[”’」』）]*")
_PARAGRAPH = re.compile(r"((?:\r?\n[ \t]*){2,})")
# Inline code and addresses, which begin with different letters.
_AS_IT_IS = re.compile(r"`[^`\n]+`|https?://[!#-&(-;=?-Z\\^-z|~]+(?<![.,;:!?)])")
_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz"})


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    Attributes:
        text: What it says.
        translate: False for what stays as it is.
        joint: Between two sentences of one line, which the target's script may write without a blank.
    """

    text: str
    translate: bool
    joint: bool = False


def split(text: str, *, lines: bool, longest: int) -> list[Piece]:
    """The pieces of a text; joined in their order they are the text.

    Args:
        text: Any text.
        lines: No piece to translate goes over a line break, or begins with a marker of a list, heading or quotation.
        longest: Characters of the longest piece to translate, where sentences or paragraphs allow it.
    """
    pieces: list[Piece] = []
    for part, is_code in _fenced(text):
        if is_code:
            pieces.append(Piece(part, False))
        elif lines:
            for line in _LINE.finditer(part):
                pieces += _line(line[1], longest)
                if line[2]:
                    pieces.append(Piece(line[2], False))
        else:
            pieces += _passages(part, longest)
    return [piece for piece in pieces if piece.text or piece.joint]


def join(pieces: Sequence[Piece], translated: Sequence[str], target: str) -> str:
    """A text from its pieces.

    Args:
        pieces: Those of :func:`split`.
        translated: What those to translate became, in their order.
        target: Code of the language; some write no blank between sentences.
    """
    given = iter(translated)
    out = []
    for piece in pieces:
        if piece.translate:
            out.append(next(given))
        elif not piece.joint:
            out.append(piece.text)
        elif target not in _WITHOUT_SPACES:
            out.append(piece.text or " ")
    return "".join(out)


def with_code_of(text: str, source: str) -> str:
    """A translation with the inline code and the addresses of its source.

    They are put back one after another where the translation has as many of each; where it does not, it stays as it is.

    Args:
        text: The translation.
        source: The text it was made of.
    """
    if "`" not in source and "://" not in source:
        return text
    wanted, found = _AS_IT_IS.findall(source), _AS_IT_IS.findall(text)
    if sorted(wanted) == sorted(found) or [w[0] for w in wanted] != [f[0] for f in found]:
        return text
    given = iter(wanted)
    return _AS_IT_IS.sub(lambda _: next(given), text)


def without_code(text: str) -> str:
    """The text without its fenced code."""
    return "".join(part for part, is_code in _fenced(text) if not is_code)


def _fenced(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of a text and whether they are fenced code; a fence that is not closed goes to the end."""
    if "```" not in text and "~~~" not in text:
        yield text, False
        return
    position = 0
    while opened := _FENCE.search(text, position):
        if opened.start() > position:
            yield text[position : opened.start()], False
        closing = re.compile(rf"^[ \t]*{re.escape(opened[1])}[ \t]*$", re.MULTILINE).search(
            text, opened.end()
        )
        end = len(text) if closing is None else closing.end()
        yield text[opened.start() : end], True
        position = end
    if position < len(text):
        yield text[position:], False


def _line(line: str, longest: int) -> Iterator[Piece]:
    marker = _MARKER.match(line)
    start = marker.end() if marker else 0
    body = line[start:]
    bare = body.rstrip()
    yield Piece(line[:start], False)
    yield from _sentences(bare, longest)
    yield Piece(body[len(bare) :], False)


def _sentences(text: str, longest: int) -> Iterator[Piece]:
    """Sentences, as many together as ``longest`` holds."""
    if not any(map(str.isalpha, text)):
        yield Piece(text, False)
        return
    start, last = 0, None
    if len(text) > longest:
        for end in _SENTENCE_END.finditer(text):
            if end.end() == len(text):
                break
            if last is not None and end.start() - start > longest:
                yield from _cut(text, start, last)
                start = last.end()
            last = end
        if last is not None and len(text) - start > longest:
            yield from _cut(text, start, last)
            start = last.end()
    yield Piece(text[start:], True)


def _cut(text: str, start: int, end: re.Match[str]) -> Iterator[Piece]:
    sentence = text[start : end.end()]
    bare = sentence.rstrip()
    yield Piece(bare, True)
    yield Piece(sentence[len(bare) :], False, joint=True)


def _passages(text: str, longest: int) -> Iterator[Piece]:
    """Paragraphs, as many together as ``longest`` holds; the blanks at both ends stay."""
    bare = text.strip()
    if not any(map(str.isalpha, bare)):
        yield Piece(text, False)
        return
    start = text.index(bare)
    yield Piece(text[:start], False)
    parts = _PARAGRAPH.split(bare)  # paragraph, break, paragraph, ...
    passage = parts[0]
    for gap, paragraph in zip(parts[1::2], parts[2::2], strict=True):
        if len(passage) + len(gap) + len(paragraph) <= longest:
            passage += gap + paragraph
            continue
        yield Piece(passage, True)
        yield Piece(gap, False)
        passage = paragraph
    yield Piece(passage, True)
    yield Piece(text[start + len(bare) :], False)
