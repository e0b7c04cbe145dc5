"""From messages to token ids, with one rule of truncation for every path.

The prompt is kept whole and a response is cut at its end, so that prompt plus response is at most ``max_length`` tokens.
What the chat template renders after the prompt counts as response, end-of-turn and a trailing newline included, as in
TRL. Where the tokenized prompt is not a prefix of prompt plus response, both responses start at the last common token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from mpo.common.log import get_logger
from mpo.data import encoding
from mpo.data.contract import HARMLESS
from mpo.data.encoding import PairEncoder, PairTexts
from mpo.errors import DataError, ModelError

logger = get_logger(__name__)

Messages = Sequence[Mapping[str, Any]]


class PairIds(NamedTuple):
    """Token ids of a preference pair. No part is empty; prompt plus a response is at most ``max_length`` long."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


_IDS = List(Value("int32"))
TOKENIZED_FEATURES = Features(
    {
        "source_prompt": _IDS,
        "source_chosen": _IDS,
        "source_rejected": _IDS,
        "target_prompt": List(_IDS),
        "target_chosen": List(_IDS),
        "target_rejected": List(_IDS),
        "target_language": List(Value("string")),
        "row": List(Value("int64")),
        "origin": Value("string"),
        "errors": List(Value("string")),
    }
)
KIND = {"kind": Value("string")}
"""The further column of tokenized groups some of which are harmless."""


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, name: str = "the tokenizer"
) -> None:
    """Make sure that the tokenizer has a chat template and a padding token.

    Args:
        tokenizer: Changed in place.
        template: Jinja text or the path of a file that holds it; None keeps the tokenizer's own.
        name: How messages call the tokenizer.

    Raises:
        ModelError: There is no chat template, or the given file cannot be read.
    """
    if template is not None:
        if "{" not in template:
            if not os.path.isfile(template):
                raise ModelError(f"chat_template '{template}' is neither Jinja text nor an existing file.")
            with open(template, encoding="utf-8") as file:
                template = file.read()
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name} has no chat template, so a prompt cannot be rendered as it is in use. Take the instruction-tuned "
            "version of the model, or pass one with `chat_template: FILE`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{name} has neither a padding nor an end-of-text token. Set `tokenizer.pad_token`.")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    field: str | None = None,
) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer: With a chat template.
        messages: In their order.
        template_kwargs: Extra arguments of the chat template.
        add_generation_prompt: End where the model's turn begins.
        field: Of the data, for the error.

    Raises:
        DataError: The template rejects the messages.
    """
    return PairEncoder(tokenizer).encode(
        [
            render_text(
                tokenizer, messages, template_kwargs, add_generation_prompt=add_generation_prompt, field=field
            )
        ]
    )[0]


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    field: str | None = None,
) -> str:
    """A conversation as the chat template renders it, special tokens written out; arguments and errors as of :func:`render`."""
    given = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=add_generation_prompt, **(template_kwargs or {})
        )
    except Exception as error:  # Jinja raises what the template's author chose to raise
        raise DataError(
            f"the chat template rejects the messages ({error}). Roles given: "
            f"{[message.get('role') for message in given]}; change them or the template.",
            field=field,
        ) from error
    assert isinstance(text, str)
    return text


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    *,
    max_length: int | None = None,
    max_response_length: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PairIds:
    """Render a preference pair with the chat template and tokenize it.

    Args:
        tokenizer: With a chat template.
        prompt: Messages up to the user's last turn.
        chosen, rejected: The assistant's message, each in a list.
        max_length: Limit of prompt plus response, in tokens.
        max_response_length: Limit of the response alone, in tokens.
        template_kwargs: Extra arguments of the chat template.

    Raises:
        DataError: The template rejects the messages, a response renders to nothing, the prompt alone leaves no room
            for a response, or nothing is left by which the two responses differ.
    """
    texts = _pair_texts(tokenizer, prompt, chosen, rejected, template_kwargs)
    (ids,) = PairEncoder(tokenizer).pairs([texts])
    return _cut_pair(tokenizer, *ids, max_length=max_length, max_response_length=max_response_length)


def _pair_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    kwargs: Mapping[str, Any] | None,
) -> PairTexts:
    def answered(response: Messages, field: str) -> str:
        return render_text(tokenizer, [*prompt, *response], kwargs, add_generation_prompt=False, field=field)

    asked = render_text(tokenizer, prompt, kwargs, field="prompt")
    return PairTexts(asked, answered(chosen, "chosen"), answered(rejected, "rejected"))


def _cut_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    chosen_ids: list[int],
    rejected_ids: list[int],
    *,
    max_length: int | None,
    max_response_length: int | None,
    alike: bool = False,
) -> PairIds:
    """The parts of a pair, from the ids of its prompt and of the prompt with either response; see :func:`tokenize_pair`."""
    start = min(_common_prefix(prompt_ids, chosen_ids), _common_prefix(prompt_ids, rejected_ids))
    if start < len(prompt_ids):
        logger.warning_once(
            "The rendered prompt is not a prefix of prompt plus response with this chat template: the response starts at "
            f"the last common token, leaving out {tokenizer.decode(prompt_ids[start:])!r}. Shown once; it is usually "
            "true of every row. A template that renders the prompt the same way in both cases avoids it."
        )
    if start == 0:
        raise DataError(
            "the prompt renders to no token that prompt plus response begins with.", field="prompt"
        )
    if max_length is not None and start >= max_length:
        raise DataError(
            f"the prompt alone has {start} tokens and fills max_length={max_length}, which leaves no room for a "
            "response. Raise `max_length`, or drop such rows with `bad_rows: drop`.",
            field="prompt",
        )
    end = min((start + max_response_length if max_response_length else math.inf), max_length or math.inf)
    stop = None if end == math.inf else int(end)
    pair = PairIds(prompt_ids[:start], chosen_ids[start:stop], rejected_ids[start:stop])
    for field, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not ids:
            raise DataError("the response renders to no token.", field=field)
    if pair.chosen == pair.rejected and not (alike and chosen_ids != rejected_ids):
        if chosen_ids == rejected_ids:
            reason = "has the same tokens as chosen, so there is no preference to learn. Give two different responses."
        else:
            reason = (
                f"is equal to chosen after the cut to {len(pair.chosen)} tokens, so there is no preference to learn. Raise "
                "`max_length` or `max_response_length`, or drop such rows with `bad_rows: drop`."
            )
        raise DataError(reason, field="rejected")
    return pair


def tokenize_group(
    group: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_response_length: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    bad_rows: str = "error",
) -> dict[str, Any]:
    """Tokenize one group of the data contract into the columns of :data:`TOKENIZED_FEATURES`.

    With ``bad_rows="drop"``, pairs that fail are left out and described in ``errors``; a group whose source fails has
    no targets.

    Raises:
        DataError: A pair fails and ``bad_rows`` is ``"error"``; names the origin, row and field.
    """
    (found,) = _tokenize(
        [group],
        [max_response_length],
        tokenizer,
        max_length=max_length,
        template_kwargs=template_kwargs,
        bad_rows=bad_rows,
    )
    return found


def _tokenize(
    groups: Sequence[Mapping[str, Any]],
    longest_responses: Sequence[int | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    template_kwargs: Mapping[str, Any] | None,
    bad_rows: str,
    harmless_alike: bool = False,
) -> list[dict[str, Any]]:
    """:func:`tokenize_group` of several groups, each with a limit of its own, in as few calls of the tokenizer as of one."""
    rendered: list[PairTexts | DataError] = []
    for group in groups:
        for pair in (group["source"], *group["targets"]):
            parts = (pair["prompt"], pair["chosen"], pair["rejected"])
            try:
                rendered.append(_pair_texts(tokenizer, *parts, template_kwargs))
            except DataError as error:
                rendered.append(error)
    sound = [texts for texts in rendered if isinstance(texts, PairTexts)]
    encoded = iter(PairEncoder(tokenizer).pairs(sound))
    all_ids = iter([next(encoded) if isinstance(texts, PairTexts) else texts for texts in rendered])
    return [
        _assemble(
            group,
            [next(all_ids) for _ in range(1 + len(group["targets"]))],
            tokenizer,
            max_length=max_length,
            max_response_length=longest,
            bad_rows=bad_rows,
            alike=harmless_alike and group.get("kind") == HARMLESS,
        )
        for group, longest in zip(groups, longest_responses, strict=True)
    ]


def _assemble(
    group: Mapping[str, Any],
    pairs: Sequence[tuple[list[int], list[int], list[int]] | DataError],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_response_length: int | None,
    bad_rows: str,
    alike: bool,
) -> dict[str, Any]:
    """A group's columns, from the ids of its source and its targets, or what is wrong with them."""
    origin = group.get("origin") or "the dataset"
    output: dict[str, Any] = {"origin": origin, "errors": [], "row": [], "target_language": []}
    if "kind" in group:
        output["kind"] = group["kind"]
    for part in PairIds._fields:
        output[f"source_{part}"] = []
        output[f"target_{part}"] = []

    def run(place: int, pair: Mapping[str, Any], name: str) -> PairIds | None:
        ids = pairs[place]
        try:
            if isinstance(ids, DataError):
                raise ids
            return _cut_pair(
                tokenizer,
                *ids,
                max_length=max_length,
                max_response_length=max_response_length,
                alike=alike,
            )
        except DataError as error:
            message = str(error)
            if error.field:
                message = message.split(": ", 1)[1]
            located = DataError(message, file=origin, row=pair.get("row"), field=f"{name}.{error.field}")
            if bad_rows == "error":
                raise located from error
            output["errors"].append(str(located))
            return None

    source = run(0, group["source"], "source")
    if source is None:
        return output
    for part, ids in source._asdict().items():
        output[f"source_{part}"] = ids
    for i, target in enumerate(group["targets"]):
        ids = run(1 + i, target, f"targets[{i}]")
        if ids is None:
            continue
        for part, value in ids._asdict().items():
            output[f"target_{part}"].append(value)
        output["target_language"].append(target["language"])
        row = target.get("row")
        output["row"].append(-1 if row is None else row)
    return output


def tokenize_groups(
    groups: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_response_length: int | None = None,
    harmless_max_response_length: int | None = None,
    harmless_alike: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    bad_rows: str = "error",
    group_by_source: bool = True,
    max_targets_per_group: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, list[str]]:
    """Tokenize a dataset of groups.

    Args:
        groups: Dataset in the data contract's canonical form.
        tokenizer: With a chat template.
        max_length, max_response_length, template_kwargs, bad_rows: See :func:`tokenize_group`.
        harmless_max_response_length: Limit of a response to a harmless prompt; unset: that of the others.
        harmless_alike: Takes harmless pairs whose responses are the same after the cut, too: those of a run that only holds what
            the model does there, where nothing is preferred.
        group_by_source: False makes every target pair a group of its own.
        max_targets_per_group: Split groups with more targets than this.
        num_proc: Processes to tokenize with.
        name: Name of the split, for the progress bar.

    Returns:
        The tokenized dataset (columns of :data:`TOKENIZED_FEATURES` without ``errors``, and the groups' ``kind`` where
        they have one) and one sentence for each pair that was dropped.

    Raises:
        DataError: A pair fails and ``bad_rows`` is ``"error"``, or nothing is left.
    """
    limit = max_targets_per_group if group_by_source else 1
    longest_harmless = harmless_max_response_length or max_response_length
    features = Features({**TOKENIZED_FEATURES, **(KIND if "kind" in groups.column_names else {})})

    def batch(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        output: dict[str, list[Any]] = {column: [] for column in features}
        whole = [{column: values[i] for column, values in rows.items()} for i in range(len(rows["source"]))]
        found = _tokenize(
            whole,
            [longest_harmless if row.get("kind") == HARMLESS else max_response_length for row in whole],
            tokenizer,
            max_length=max_length,
            template_kwargs=template_kwargs,
            bad_rows=bad_rows,
            harmless_alike=harmless_alike,
        )
        for group in found:
            for j, part in enumerate(_split_targets(group, limit)):
                for column in features:
                    output[column].append(part[column] if column != "errors" or j == 0 else [])
        return output

    tokenized = groups.map(
        batch,
        batched=True,
        batch_size=64,
        remove_columns=groups.column_names,
        features=features,
        num_proc=num_proc,
        new_fingerprint=_fingerprint(
            groups,
            tokenizer,
            max_length,
            max_response_length,
            longest_harmless,
            harmless_alike,
            template_kwargs,
            bad_rows,
            limit,
        ),
        desc=f"Tokenizing {name} groups",
    )
    errors: list[str] = []
    if bad_rows == "drop":
        errors = [error for found in tokenized.with_format(None)["errors"] for error in found]
        if errors:
            tokenized = tokenized.filter(
                lambda languages: len(languages) > 0,
                input_columns="target_language",
                desc="Dropping bad groups",
            )
    if len(tokenized) == 0:
        raise DataError(
            f"the {name} data has no usable group"
            + (f"; all {len(errors)} bad rows were dropped, the first: {errors[0]}" if errors else ".")
        )
    return tokenized.remove_columns("errors"), errors


def _fingerprint(groups: Dataset, tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str | None:
    """
    Names the cache of tokenized groups after all that decides what is in it: ranks of a run share it, and a run that is begun again
    reads it. The library's own name costs a second for each split, since it pickles the tokenizer; None stands for that.
    """
    if not (tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")):
        return None
    backend = tokenizer.backend_tokenizer
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, encoding.__file__)]
    about = (
        type(tokenizer).__qualname__,
        backend.to_str(),
        backend.encode_special_tokens,  # which is not in the text
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        transformers.__version__,
        version("tokenizers"),
    )
    name: str = Hasher.hash((groups._fingerprint, about, *code, *settings))
    return name


def _split_targets(group: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    count = len(group["target_language"])
    if limit is None or count <= limit:
        return [group]
    per_target = [column for column in group if column.startswith("target_") or column == "row"]
    return [
        {**group, **{column: group[column][start : start + limit] for column in per_target}}
        for start in range(0, count, limit)
    ]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
