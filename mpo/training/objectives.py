"""What a run minimises: the objectives that ``loss_type`` can name, what each of them needs, and their weighted sum.

The formulas are in :mod:`mpo.modeling.loss` and :mod:`mpo.modeling.objectives`. :func:`register_objective` adds one; an
installed package can add one by an entry point of the group ``mpo.objectives`` that leads to an :class:`Objective`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from mpo.common.words import listed
from mpo.errors import ConfigError
from mpo.modeling import objectives as formulas
from mpo.modeling.loss import mpo_loss, reward_gap, reward_gap_loss
from mpo.modeling.pairs import PairTensors

ENTRY_POINTS = "mpo.objectives"
TRAIN_ON = ("targets", "source", "both")

REFERENCE = "reference"  # log-likelihoods of the pair's own responses under the reference
SOURCE_GAP = "source_gap"  # the reference's gap on the pair's source
RETENTION = "retention"  # hidden states of the source, then and now; nothing at `retain_weight: 0`
PROMPT = "prompt"  # log-likelihoods of the prompts' tokens
MISMATCHED = "mismatched"  # those of other pairs' responses, for KTO's reference point
STATES = "states"  # hidden states of a prompt in all its languages, at `state_layer` and `state_position`
NEEDS = (REFERENCE, SOURCE_GAP, RETENTION, PROMPT, MISMATCHED, STATES)
_READ_BY_NEED = {RETENTION: ("retain_weight",), STATES: ("state_layer", "state_position")}

Loss = Callable[[PairTensors, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss that ``loss_type`` can name.

    Attributes:
        loss: Of pairs and the run's :class:`~mpo.training.config.MPOConfig`: the loss of each pair, ``[T]``.
        paper: Where it is from.
        published: The settings it reads that a recipe may leave unset, each with its value in the paper, or else in TRL:
            ``beta``, ``label_smoothing``.
        options: Other settings of objectives that it reads.
        needs: What must be computed for it, some of :data:`NEEDS`.
        targets_only: Why it cannot train on sources; empty where it can.
        harmless_only: Why it is for harmless groups alone; empty where it is for all.
    """

    loss: Loss
    paper: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    targets_only: str = ""
    harmless_only: str = ""

    @property
    def reads(self) -> set[str]:
        """All settings of objectives that it reads."""
        by_need = {option for need in self.needs for option in _READ_BY_NEED.get(need, ())}
        return {*self.published, *self.options, *by_need}


_known: dict[str, Objective] = {}


def register_objective(
    name: str,
    loss: Loss,
    *,
    paper: str = "",
    published: Mapping[str, float] | None = None,
    options: Iterable[str] = (),
    needs: Iterable[str] = (),
    targets_only: str = "",
    harmless_only: str = "",
) -> Objective:
    """Add an objective, so that recipes can name it in ``loss_type``.

    Args:
        name: In ``loss_type``.
        loss, paper, published, options, needs, targets_only, harmless_only: See :class:`Objective`.

    Returns:
        What was registered.

    Raises:
        ConfigError: The name is taken by another loss, or something is needed that nothing provides.

    Example:
        >>> def absolute(pairs, args):
        ...     gap = pairs.chosen_logps - pairs.rejected_logps
        ...     return (args.beta * gap - pairs.reference_gap).abs()
        >>> _ = register_objective("absolute", absolute, published={"beta": 1.0}, needs=["source_gap"])
    """
    return _add(
        name,
        Objective(
            loss,
            paper,
            dict(published or {}),
            tuple(options),
            frozenset(needs),
            targets_only,
            harmless_only,
        ),
    )


def _add(name: str, objective: Objective) -> Objective:
    if unknown := sorted(objective.needs - set(NEEDS)):
        raise ConfigError(
            f"the objective `{name}` needs {listed(unknown)}, which nothing provides; expected some of {listed(NEEDS)}."
        )
    if RETENTION in objective.needs and not objective.targets_only:
        objective = replace(objective, targets_only="its retention term holds the source still")
    if _known.setdefault(name, objective) != objective:
        raise ConfigError(f"there is an objective `{name}` already. Choose another name.")
    return objective


# What TRL has and is not a function of one pair, each with the reason why it is not trained here.
REFUSED = dict.fromkeys(
    ("aot", "aot_unpaired"),
    "it sorts the log-ratios of a batch, so the loss of a pair would depend on which pairs come with it: on the "
    "grouping, the accumulation and the number of ranks",
)


def find_objective(name: str) -> Objective:
    """The objective of a name, registered or of an installed package.

    Raises:
        ConfigError: There is none, or it cannot be trained here.
    """
    if name in _known:
        return _known[name]
    if name in REFUSED:
        raise ConfigError(f"`loss_type` names {name!r}, which is not trained here: {REFUSED[name]}.")
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            found = entry.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise ConfigError(
                f"the objective {name!r} cannot be loaded from {entry.value}: {type(error).__name__}: {error}."
            ) from error
        if not isinstance(found, Objective):
            raise ConfigError(
                f"the entry point {name!r} leads to {entry.value}, a {type(found).__name__}; expected an "
                "`mpo.training.objectives.Objective`, as `register_objective` returns it."
            )
        return _add(name, found)
    near = difflib.get_close_matches(name, _known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"`loss_type` names {name!r}; expected objectives among {', '.join(sorted(_known))}, or one that a package has "
        f"registered.{hint}"
    )


def readers(option: str) -> list[str]:
    """Names of the registered objectives that read a setting."""
    return [name for name, objective in _known.items() if option in objective.reads]


class Objectives:
    """The objectives of a run and their weights.

    Args:
        args: The run's :class:`~mpo.training.config.MPOConfig`.

    Attributes:
        by_name: The objectives in the order of ``loss_type``.
        weights: Of each.
        beta: Their temperature.
        needs: What must be computed for some of them.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self.by_name = {name: find_objective(name) for name in args.loss_type}
        self.weights = list(args.loss_weights or [1.0] * len(self.by_name))
        self.beta: float = args.beta
        self.needs = {need for objective in self.by_name.values() for need in objective.needs}
        if not args.retain_weight:
            self.needs.discard(RETENTION)

    @property
    def names(self) -> list[str]:
        """In the order of ``loss_type``."""
        return list(self.by_name)

    @property
    def reads(self) -> set[str]:
        """The settings that some of them read."""
        return {option for objective in self.by_name.values() for option in objective.reads}

    @property
    def needs_shared(self) -> bool:
        """Whether log-likelihoods of the responses' first tokens are needed, for ``ld_alpha``."""
        return self._args.ld_alpha is not None and "ld_alpha" in self.reads

    def description(self) -> str:
        """For people: the objectives with their weights, temperature and pairs."""
        args = self._args
        if not self.by_name:
            return "nothing"
        shown = [
            name if weight == 1 else f"{weight:g} {name}"
            for name, weight in zip(self.by_name, self.weights, strict=True)
        ]
        temperature = f", beta {self.beta:g}" if "beta" in self.reads else ""
        pairs = {"targets": "targets", "source": "sources", "both": "targets and sources"}[args.train_on]
        return f"{' + '.join(shown)}{temperature}, trained on {pairs}"

    def terms(self, pairs: PairTensors) -> dict[str, Tensor]:
        """The loss of each pair by each objective, ``[T]``, without its weight."""
        return {name: objective.loss(pairs, self._args) for name, objective in self.by_name.items()}

    def loss(self, pairs: PairTensors) -> Tensor:
        """The weighted sum of the terms, ``[T]``."""
        terms = list(self.terms(pairs).values())
        if not terms:
            return torch.zeros_like(pairs.chosen_logps)
        if self.weights == [1.0]:
            return terms[0]
        return torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum(0)


def take_published(args: Any, neutral: Mapping[str, float], prefix: str = "") -> None:
    """Set what the papers of a run's objectives give a value and its settings do not.

    Args:
        args: The settings, changed in place.
        neutral: The settings by name, each with its value where no paper has one.
        prefix: Before the names, for people.

    Raises:
        ConfigError: The papers give different ones.
    """
    for name, value in neutral.items():
        if getattr(args, name) is not None:
            continue
        objectives = args.objectives.by_name
        found = {key: o.published[name] for key, o in objectives.items() if name in o.published}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"`{prefix}{name}` is not set, and its published values differ: "
                f"{', '.join(f'{value:g} for {key}' for key, value in found.items())}. Set `{prefix}{name}`, which all of "
                "them then take."
            )
        setattr(args, name, next(iter(found.values()), value))


# ---- The objectives ----------------------------------------------------------------------------------------------


def _objective(name: str, arxiv: str = "", **settings: Any) -> Callable[[Loss], Loss]:
    """Register the function that it decorates."""

    def register(loss: Loss) -> Loss:
        register_objective(name, loss, paper=arxiv and f"arXiv {arxiv}", **settings)
        return loss

    return register


@_objective(
    "mpo",
    "2505.16869",
    published={"beta": 1.0},
    options=("mpo_delta",),
    needs=(SOURCE_GAP, RETENTION),
    targets_only="MPO pulls the target languages to the gap of the source, which it holds still",
)
def _mpo(pairs: PairTensors, args: Any) -> Tensor:
    return mpo_loss(
        reward_gap(pairs.chosen_logps, pairs.rejected_logps),
        pairs.reference_gap,
        pairs.retention,
        beta=args.beta,
        retain_weight=args.retain_weight,
        delta=args.mpo_delta,
    )


@_objective(
    "gap_retention",
    needs=(REFERENCE,),
    harmless_only="it holds each pair's gap where it starts, and harmful pairs are to leave it",
)
def _gap_retention(pairs: PairTensors, args: Any) -> Tensor:
    """MPO's gap term with the pair itself, under the reference, for its source: ``(RG_theta(x) - RG_ref(x))^2``."""
    del args
    gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
    assert pairs.reference_chosen_logps is not None and pairs.reference_rejected_logps is not None
    return reward_gap_loss(gap, reward_gap(pairs.reference_chosen_logps, pairs.reference_rejected_logps), 1.0)


# TRL's DPO family, on the log-ratios of the pair's own responses. The f-divergence takes the place of a log-ratio where
# only the difference of chosen and rejected counts, in which the unknown normaliser of the policy's optimum cancels.
_LD = {"needs": (REFERENCE,), "options": ("ld_alpha",)}
_F = {"needs": (REFERENCE,), "options": ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef")}


def _log_ratios(pairs: PairTensors, args: Any) -> tuple[Tensor, Tensor]:
    chosen, rejected = pairs.log_ratios
    if args.ld_alpha is None:
        return chosen, rejected
    assert pairs.shared_sums is not None and pairs.reference_shared_sums is not None
    shared = pairs.shared_sums - pairs.reference_shared_sums
    return (
        formulas.shortened(chosen, shared[:, 0], args.ld_alpha),
        formulas.shortened(rejected, shared[:, 1], args.ld_alpha),
    )


def _scores(pairs: PairTensors, args: Any) -> tuple[Tensor, Tensor]:
    divergence, coefficient = args.f_divergence_type, args.f_alpha_divergence_coef
    chosen, rejected = _log_ratios(pairs, args)
    return (
        formulas.divergence_score(chosen, divergence, coefficient),
        formulas.divergence_score(rejected, divergence, coefficient),
    )


def _margin(pairs: PairTensors, args: Any) -> Tensor:
    chosen, rejected = _scores(pairs, args)
    return chosen - rejected


def _margin_per_token(pairs: PairTensors, args: Any) -> Tensor:
    chosen, rejected = _scores(pairs, args)
    assert pairs.chosen_lengths is not None and pairs.rejected_lengths is not None
    return chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths


@_objective("sigmoid", "2305.18290", published={"beta": 0.1}, **_F)
def _sigmoid(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.sigmoid_loss(_margin(pairs, args), args.beta)


@_objective("sigmoid_norm", "2411.15124", published={"beta": 5.0}, **_F)
def _sigmoid_norm(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.sigmoid_loss(_margin_per_token(pairs, args), args.beta)


@_objective("hinge", "2305.10425", published={"beta": 0.1}, **_F)
def _hinge(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.hinge_loss(_margin(pairs, args), args.beta)


@_objective("ipo", "2310.12036", published={"beta": 0.1}, **_F)
def _ipo(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.ipo_loss(_margin_per_token(pairs, args), args.beta)


@_objective("exo_pair", "2402.00856", published={"beta": 0.1, "label_smoothing": 1e-3}, **_F)
def _exo_pair(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.exo_pair_loss(_margin(pairs, args), args.beta, args.label_smoothing)


@_objective("robust", "2403.00409", published={"beta": 0.01, "label_smoothing": 0.1}, **_F)
def _robust(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.robust_loss(_margin(pairs, args), args.beta, args.label_smoothing)


@_objective(
    "discopop",
    "2406.08414",
    published={"beta": 0.05},
    needs=(REFERENCE,),
    options=(*_F["options"], "discopop_tau"),
)
def _discopop(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.discopop_loss(_margin(pairs, args), args.beta, args.discopop_tau)


@_objective("nca_pair", "2402.05369", published={"beta": 0.01}, **_LD)
def _nca_pair(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.nca_pair_loss(*_log_ratios(pairs, args), args.beta)


@_objective("bco_pair", "2404.04656", published={"beta": 0.01}, **_LD)
def _bco_pair(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.bco_pair_loss(*_log_ratios(pairs, args), args.beta)


@_objective("sppo_hard", "2405.00675", published={"beta": 0.001}, **_LD)
def _sppo_hard(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.sppo_hard_loss(*_log_ratios(pairs, args), args.beta)


@_objective("apo_zero", "2408.06266", published={"beta": 0.1}, **_LD)
def _apo_zero(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.apo_zero_loss(*_log_ratios(pairs, args), args.beta)


@_objective("apo_down", "2408.06266", published={"beta": 0.1}, **_LD)
def _apo_down(pairs: PairTensors, args: Any) -> Tensor:
    return formulas.apo_down_loss(*_log_ratios(pairs, args), args.beta)


@_objective("rdpo", "2403.19159", published={"beta": 0.1}, needs=(REFERENCE,), options=("rdpo_alpha",))
def _rdpo(pairs: PairTensors, args: Any) -> Tensor:
    assert pairs.chosen_lengths is not None and pairs.rejected_lengths is not None
    longer = pairs.chosen_lengths - pairs.rejected_lengths
    return formulas.rdpo_loss(*pairs.log_ratios, longer, args.beta, args.rdpo_alpha)


@_objective(
    "kto",
    "2402.01306",
    published={"beta": 0.1},
    needs=(REFERENCE, MISMATCHED),
    options=("desirable_weight", "undesirable_weight"),
)
def _kto(pairs: PairTensors, args: Any) -> Tensor:
    assert pairs.step is not None
    weights = args.desirable_weight, args.undesirable_weight
    return formulas.kto_loss(*pairs.log_ratios, pairs.step.kl, args.beta, *weights)


# Without a reference.


@_objective("sft")
def _sft(pairs: PairTensors, args: Any) -> Tensor:
    """Its mean over the step's pairs is the mean over the tokens of their chosen responses."""
    assert pairs.step is not None
    return -pairs.sums[0] / pairs.step.chosen_tokens


@_objective("first_token")
def _first_token(pairs: PairTensors, args: Any) -> Tensor:
    """By its first token a response is a refusal or an answer; under `sft` that token is one of all."""
    assert pairs.first_logps is not None
    return -pairs.first_logps[:, 0]


@_objective("simpo", "2405.14734", published={"beta": 2.0, "label_smoothing": 0.0}, options=("simpo_gamma",))
def _simpo(pairs: PairTensors, args: Any) -> Tensor:
    margin = reward_gap(pairs.chosen_logps, pairs.rejected_logps) - args.simpo_gamma / args.beta
    return formulas.sigmoid_loss(margin, args.beta, args.label_smoothing)


@_objective("cpo", "2401.08417", published={"beta": 0.1, "label_smoothing": 0.0}, options=("cpo_alpha",))
def _cpo(pairs: PairTensors, args: Any) -> Tensor:
    chosen, rejected = pairs.sums
    preference = formulas.sigmoid_loss(chosen - rejected, args.beta, args.label_smoothing)
    return preference + args.cpo_alpha * _sft(pairs, args)


@_objective("orpo", "2403.07691", published={"beta": 0.1}, needs=(PROMPT,))
def _orpo(pairs: PairTensors, args: Any) -> Tensor:
    """Its likelihood term becomes the mean over the tokens of the step's prompts and chosen responses."""
    assert pairs.step is not None and pairs.prompt_sums is not None
    likelihood = (pairs.sums[0] + pairs.prompt_sums) / pairs.step.sequence_tokens
    return args.beta * formulas.odds_ratio_loss(pairs.chosen_logps, pairs.rejected_logps) - likelihood


@_objective("mlc", options=("mlc_temperature",), needs=(STATES,))
def _mlc(pairs: PairTensors, args: Any) -> Tensor:
    """Its mean over the step's pairs is the mean over their prompts: a pair has its share of that of its prompt."""
    assert pairs.prompt_states is not None and pairs.prompt_counts is not None
    assert pairs.prompt_of_pair is not None and pairs.step is not None
    losses = formulas.consistency_loss(pairs.prompt_states, pairs.prompt_counts, args.mlc_temperature)
    ones = torch.ones_like(pairs.prompt_of_pair)
    trained = torch.zeros_like(pairs.prompt_counts).index_add(0, pairs.prompt_of_pair, ones)
    return losses[pairs.prompt_of_pair] / (trained[pairs.prompt_of_pair] * pairs.step.prompts)
