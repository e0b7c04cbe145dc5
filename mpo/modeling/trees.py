"""Preference trees: ``[prompt | chosen | rejected]`` with the prompt computed once, packed into rows.

A tree holds a preference pair without repeating its prompt. The rejected branch's positions restart after the prompt,
and a token sees its own tree's prompt and its own branch only (:mod:`mpo.modeling.masks`), so every token gets exactly the
context it has in the two separate sequences ``prompt + chosen`` and ``prompt + rejected``.

Both layouts produce the same set of tensors, so what follows the model call does not know which one was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Values of `branch_ids`. Padding belongs to no tree (`tree_ids == PADDING`).
PROMPT, CHOSEN, REJECTED = 0, 1, 2
PADDING = -1

# Keys of a batch that the reward-gap head reads (`mpo.modeling.head`); everything else belongs to the loss.
MODEL_KEYS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "tree_ids",
    "branch_ids",
    "tree_spans",
    "score_index",
    "score_labels",
    "score_lengths",
    "score_shared",
    "score_greedy",
    "prompt_index",
    "prompt_labels",
    "prompt_lengths",
    "pool_index",
    "pool_lengths",
    "state_index",
    "state_layer",
    "kept_index",
    "kept_lengths",
    "kept_paths",
    "kept_prompts",
    "kept_answers",
    "kept_states",
    "kept_by",
)


class Tree(NamedTuple):
    """One preference pair as token ids. ``score`` and ``pool`` say what the head computes for it."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    score: bool = True
    """Whether log-likelihoods of the two responses are needed."""
    pool: bool = False
    """Whether pooled hidden states of the two sequences are needed."""
    prompt_state: int = 0
    """Token of the prompt whose hidden state is needed, from -1 for the last; its first where it has fewer. 0 for none."""
    keep: bool = False
    """Whether what is said after each token of prompt and responses is held; of a tree that is scored."""

    @property
    def size(self) -> int:
        """Tokens of the tree: prompt once, both responses."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def pack_rows(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing bin packing.

    Args:
        sizes: Number of tokens of each item.
        max_tokens: Capacity of a row. An item larger than this gets a row of its own.

    Returns:
        Rows of item indices. The result depends on ``sizes`` and ``max_tokens`` only: ties keep the items' order.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for row, space in enumerate(free):
            if sizes[item] <= space:
                rows[row].append(item)
                free[row] -= sizes[item]
                break
        else:
            rows.append([item])
            free.append(max_tokens - sizes[item])
    return rows


def even_rows(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As few rows as :func:`pack_rows` needs, as short as they can be.

    All rows of a call are as long as the longest, so what evens them out saves padding.

    Args:
        sizes: Number of tokens of each item.
        max_tokens: Most tokens of a row; where an item is larger, its size.

    Returns:
        Rows of item indices, by ``sizes`` and ``max_tokens`` only.
    """
    # A row is as long as the longest item in any case, which makes room for others in the other rows.
    rows = pack_rows(sizes, max(max_tokens, *sizes))
    most = max(sum(sizes[i] for i in row) for row in rows)
    least = max(max(sizes), -(-sum(sizes) // len(rows)))
    while least < most:
        middle = (least + most) // 2
        shorter = pack_rows(sizes, middle)
        if len(shorter) <= len(rows):
            rows, most = shorter, middle
        else:
            least = middle + 1
    return rows


def build_batch(
    trees: Sequence[Tree],
    *,
    layout: str,
    max_tokens_per_row: int,
    pad_token_id: int,
    pooling: str,
    pad_to_multiple_of: int | None = None,
    score_prompts: bool = False,
    score_shared: bool = False,
) -> dict[str, Any]:
    """Turn trees into the tensors of one model call.

    Args:
        trees: Preference pairs, every part of at least one token.
        layout: ``"tree"`` or ``"padded"`` (one sequence per row, two rows per tree).
        max_tokens_per_row: Row budget of the tree layout; the longest tree's size where that is larger, since all
            rows of a batch have one length.
        pad_token_id: Token that fills rows.
        pooling: ``"mean"`` or ``"last"``, see :func:`mpo.modeling.loss.retention_loss`.
        pad_to_multiple_of: Round the row length up to a multiple of this.
        score_prompts: Whether log-likelihoods of the scored trees' prompts are needed, too.
        score_shared: Whether those of the first tokens of the responses are needed, as many as the shorter one has.

    Returns:
        With R rows of S tokens, T scored trees and N scored response tokens, P pooled trees:

        - ``input_ids``, ``position_ids``: ``[R, S]``
        - ``tree_ids``, ``branch_ids``: ``[R, S]`` (tree layout) or ``attention_mask``: ``[R, S]`` (padded layout)
        - ``tree_spans`` (tree layout): numbers of tokens of prompt, chosen, rejected and of the padding after them, of one
          tree after another as they lie in the rows; together they are R * S. Plain numbers, so that nobody has to ask
          the device for them
        - ``score_index``: ``[N]``, flat position (row * S + column) whose hidden state predicts the token
        - ``score_labels``: ``[N]``, the token
        - ``score_lengths``: ``[2T]``, tokens of chosen and rejected of each scored tree in turn
        - ``score_shared``: ``[N]``, True for the first tokens of a response (with ``score_shared``)
        - ``prompt_index``, ``prompt_labels``, ``prompt_lengths``: the same for the prompts' tokens but their first,
          ``[T]`` lengths (with ``score_prompts``)
        - ``state_index``: ``[Q]``, flat positions of tokens of prompts, of the trees that ask for their states (only if some
          do)
        - ``pool_index``: flat positions of the tokens that are pooled, ``pool_lengths``: ``[2P]``
        - ``kept_index``: flat positions of the tokens of prompt and both responses but their last ones, of the K trees that
          keep them, ``kept_lengths``: ``[4K]``, how many of them lie before the prompt's last token, are it, and are of the
          chosen and of the rejected response; ``kept_paths``: ``[2, K, L]``, for each of the latter the place of its
          log-likelihood among the N and its own place in ``kept_index``, -1 beyond them; ``kept_prompts``, places in ``kept_index`` of
          the first of the four parts, and ``kept_answers``, of the others (only if some do)

    Raises:
        ValueError: A tree has an empty part, or is kept and not scored.
    """
    for i, tree in enumerate(trees):
        if not (len(tree.prompt) and len(tree.chosen) and len(tree.rejected)):
            raise ValueError(f"tree {i} has an empty prompt or response")
        if tree.keep and not tree.score:
            raise ValueError(f"tree {i} is kept and not scored")
    build = _tree_rows if layout == "tree" else _padded_rows
    rows, columns, starts, length = build(trees, max_tokens_per_row)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    shape = (rows, length)

    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    tree_ids = np.full(shape, PADDING, dtype=np.int32)
    branch_ids = np.zeros(shape, dtype=np.int8)
    score_index: list[np.ndarray] = []
    score_labels: list[np.ndarray] = []
    score_lengths: list[int] = []
    shared: list[np.ndarray] = []
    prompt_index: list[np.ndarray] = []
    prompt_labels: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    state_index: list[int] = []
    pool_index: list[np.ndarray] = []
    pool_lengths: list[int] = []
    kept_index: list[np.ndarray] = []
    kept_lengths: list[int] = []
    paths: list[tuple[int, int]] = []

    for i, tree in enumerate(trees):
        prompt_length = len(tree.prompt)
        for branch, response in ((CHOSEN, tree.chosen), (REJECTED, tree.rejected)):
            row = columns[i][branch - 1]
            prompt_start, start = starts[i][branch - 1]
            end = start + len(response)
            prompt = slice(prompt_start, prompt_start + prompt_length)
            input_ids[row, prompt] = tree.prompt
            position_ids[row, prompt] = np.arange(prompt_length)
            tree_ids[row, prompt] = i
            branch_ids[row, prompt] = PROMPT
            input_ids[row, start:end] = response
            position_ids[row, start:end] = np.arange(prompt_length, prompt_length + len(response))
            tree_ids[row, start:end] = i
            branch_ids[row, start:end] = branch

            base = row * length
            prompt_positions = base + np.arange(prompt_start, prompt_start + prompt_length)
            response_positions = base + np.arange(start, end)
            if tree.score:
                # A token is predicted by the one before it: the first of a branch by the last of the prompt.
                score_index.append(np.concatenate([prompt_positions[-1:], response_positions[:-1]]))
                score_labels.append(np.asarray(response, dtype=np.int64))
                score_lengths.append(len(response))
                if score_shared:
                    shared.append(np.arange(len(response)) < min(len(tree.chosen), len(tree.rejected)))
                if score_prompts and branch == CHOSEN:  # one prompt, also of two rows
                    prompt_index.append(prompt_positions[:-1])
                    prompt_labels.append(np.asarray(tree.prompt[1:], dtype=np.int64))
                    prompt_lengths.append(prompt_length - 1)
            if tree.prompt_state and branch == CHOSEN:
                state_index.append(int(prompt_positions[max(tree.prompt_state, -prompt_length)]))
            if tree.keep and branch == CHOSEN:
                kept_index.append(prompt_positions)
                kept_lengths += [prompt_length - 1, 1]
            if tree.keep:
                kept_index.append(response_positions[:-1])
                kept_lengths.append(len(response) - 1)
            if tree.keep and branch == REJECTED:
                paths.append((len(score_lengths) - 1, len(kept_lengths) - 1))
            if tree.pool:
                pooled = (
                    np.concatenate([prompt_positions, response_positions])
                    if pooling == "mean"
                    else response_positions[-1:]
                )
                pool_index.append(pooled)
                pool_lengths.append(len(pooled))

    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "score_index": _concatenate(score_index),
        "score_labels": _concatenate(score_labels),
        "score_lengths": torch.tensor(score_lengths, dtype=torch.long),
        "pool_index": _concatenate(pool_index),
        "pool_lengths": torch.tensor(pool_lengths, dtype=torch.long),
    }
    if state_index:
        batch["state_index"] = torch.tensor(state_index, dtype=torch.long)
    if kept_index:
        batch["kept_index"] = _concatenate(kept_index)
        batch["kept_lengths"] = torch.tensor(kept_lengths, dtype=torch.long)
        batch["kept_paths"] = _paths(paths, score_lengths, kept_lengths)
        answers = np.repeat(np.arange(len(kept_lengths)) % 4 > 0, kept_lengths)
        batch["kept_prompts"], batch["kept_answers"] = (
            torch.from_numpy(np.flatnonzero(part)) for part in (~answers, answers)
        )
    if score_shared:
        batch["score_shared"] = _concatenate(shared)
    if score_prompts:
        batch["prompt_index"] = _concatenate(prompt_index)
        batch["prompt_labels"] = _concatenate(prompt_labels)
        batch["prompt_lengths"] = torch.tensor(prompt_lengths, dtype=torch.long)
    if layout == "tree":
        batch["tree_ids"] = torch.from_numpy(tree_ids)
        batch["branch_ids"] = torch.from_numpy(branch_ids)
        batch["tree_spans"] = _spans(trees, starts, columns, length)
    else:
        batch["attention_mask"] = torch.from_numpy((tree_ids != PADDING).astype(np.int64))
    return batch


_Starts = list[tuple[tuple[int, int], tuple[int, int]]]
_Placement = tuple[int, list[tuple[int, int]], _Starts, int]


def _tree_rows(trees: Sequence[Tree], max_tokens: int) -> _Placement:
    """Row of each tree's branches, where its prompt and each branch start, and the row length."""
    sizes = [tree.size for tree in trees]
    rows = even_rows(sizes, max_tokens)
    columns = [(0, 0)] * len(trees)
    starts = [((0, 0), (0, 0))] * len(trees)
    length = 0
    for row, items in enumerate(rows):
        offset = 0
        for i in items:
            tree = trees[i]
            chosen = offset + len(tree.prompt)
            columns[i] = (row, row)
            starts[i] = ((offset, chosen), (offset, chosen + len(tree.chosen)))
            offset += tree.size
        length = max(length, offset)
    return len(rows), columns, starts, length


def _padded_rows(trees: Sequence[Tree], max_tokens: int) -> _Placement:
    """The same for one sequence per row: row 2i is prompt + chosen of tree i, row 2i + 1 prompt + rejected."""
    del max_tokens
    columns = [(2 * i, 2 * i + 1) for i in range(len(trees))]
    starts = [((0, len(tree.prompt)), (0, len(tree.prompt))) for tree in trees]
    length = max(len(tree.prompt) + max(len(tree.chosen), len(tree.rejected)) for tree in trees)
    return 2 * len(trees), columns, starts, length


def _spans(
    trees: Sequence[Tree], starts: _Starts, columns: Sequence[tuple[int, int]], length: int
) -> tuple[int, ...]:
    """Lengths of the three parts of each tree and of the padding after it, in the order of the rows."""
    places = sorted((columns[i][0] * length + starts[i][0][0], i) for i in range(len(trees)))
    ends = [place for place, _ in places[1:]] + [(1 + max(row for row, _ in columns)) * length]
    lengths: list[int] = []
    for (place, i), end in zip(places, ends, strict=True):
        tree = trees[i]
        lengths += [len(tree.prompt), len(tree.chosen), len(tree.rejected), end - place - tree.size]
    return tuple(lengths)


def _paths(
    entries: Sequence[tuple[int, int]], score_lengths: Sequence[int], kept_lengths: Sequence[int]
) -> Tensor:
    """``kept_paths`` of :func:`build_batch`, from the entries that each rejected response has in the two lists of lengths."""
    scored, kept = np.array(entries).T
    first = np.stack([np.cumsum([0, *score_lengths])[scored], np.cumsum([0, *kept_lengths])[kept]])
    count = np.array(kept_lengths)[kept]
    along = np.arange(count.max())
    return torch.from_numpy(np.where(along < count[:, None], first[..., None] + along, -1))


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.long)
