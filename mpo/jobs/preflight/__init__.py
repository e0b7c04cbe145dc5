"""What a run will do, worked out and checked before anything costs time: no weights are loaded here."""

from __future__ import annotations

from typing import Any

from mpo.common.words import counted, listed
from mpo.data import language_name
from mpo.errors import ConfigError
from mpo.evaluation.probe.watch import prompts_of
from mpo.jobs.preflight.data import (
    check_data_files,
    harmless_refused,
    load_data,
    other_refusals,
    shared_sources,
)
from mpo.jobs.preflight.facts import facts_of
from mpo.jobs.preflight.folder import check_disk, check_output_folder, checkpoint_to_resume, disk_space
from mpo.jobs.preflight.in_between import measured_in_between
from mpo.jobs.preflight.leaks import leaks_of
from mpo.jobs.preflight.model import with_adapter, with_model_choices
from mpo.jobs.preflight.packages import check_packages, upload_obstacle
from mpo.jobs.preflight.plan import Plan
from mpo.modeling.loading import ModelSource, adapter_settings, empty_model, load_config
from mpo.modeling.opening import another_base, open_tokenizer, trained_template_kwargs
from mpo.training.checks import (
    check_best_metric,
    check_harmless,
    check_state_layer,
    check_tokens,
)
from mpo.training.compute import is_installed
from mpo.training.harmless import harmless_groups
from mpo.training.recipe import Recipe
from mpo.training.resume import check_planned
from mpo.training.sampling import count_languages, cut_short, without_harmless
from mpo.training.workload import count_work, schedule, tokenize_for_training

_TEACH_TEXT = ("sft", "cpo", "orpo")  # objectives that raise the likelihood of the chosen response by itself

__all__ = ["Plan", "check_output_folder", "check_packages", "make_plan"]


def make_plan(recipe: Recipe, *, on_this_machine: bool = True) -> Plan:
    """Checks a recipe against this machine, the model and the data, cheapest first, and says what the run will do.

    Args:
        recipe: What to run.
        on_this_machine: False for a plan that is only looked at: settings that this machine cannot honour become notes.

    Raises:
        MPOError: The first thing that would make the run fail; see :mod:`mpo.errors`.
    """
    notes = list(recipe.unavailable)
    if on_this_machine and recipe.unavailable:
        raise ConfigError(
            f"{recipe.source_path}: {'; '.join(recipe.unavailable)}. Change it, or set `use_cpu: true` to train on the "
            "CPU on purpose."
        )
    check_output_folder(recipe, create=on_this_machine)
    check_packages(recipe, on_this_machine=on_this_machine)
    if not on_this_machine and (obstacle := upload_obstacle(recipe.training)):
        notes.append(obstacle.rstrip("."))
    check_data_files(recipe)

    training = recipe.training
    source = ModelSource(
        str(recipe.model.model_name_or_path), recipe.model.model_revision, bool(training.trust_remote_code)
    )
    config = load_config(source)
    recipe = with_model_choices(recipe, config, on_this_machine=on_this_machine)
    adapter = recipe.model.adapter_name_or_path
    # Reads the weights of a folder, and the notes are the main process's to print.
    if adapter is not None and training.process_index == 0:
        notes.extend(filter(None, [another_base(adapter, adapter_settings(adapter), source)]))
    tokenizer = open_tokenizer(source, config, adapter, chat_template=training.chat_template)
    if training.chat_template_kwargs is None:
        training.chat_template_kwargs = trained_template_kwargs(source, adapter) or None
    if recipe.model.reference_model_name_or_path is not None:
        load_config(ModelSource(recipe.model.reference_model_name_or_path, None, source.trust_remote_code))
    model = empty_model(config, source)
    peft_config = None
    trained: Any = model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recipe.model.trains_adapter:
        peft_config, trained = with_adapter(recipe, model)
    trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)

    data, train, held_out, dropped = load_data(recipe)
    for problem in dropped[:3]:
        notes.append(
            f"dropped {problem.file}, row {problem.row}"
            + (f", field `{problem.field}`" if problem.field else "")
            + f": {problem.reason}"
        )
    tokenized, errors = tokenize_for_training(train, tokenizer, training)
    held_out_pairs = 0
    held_out_work = None
    if held_out is not None:
        held, more = tokenize_for_training(held_out, tokenizer, training, name="held-out")
        check_tokens(held, model, tokenizer, "held-out")
        measured = count_languages(held)
        held_out_pairs = sum(measured.values())
        held_out_work = count_work(held, training)
        errors += more
        check_best_metric(training, list(measured), [])
    notes.extend(errors[:3])
    harmless = harmless_groups(tokenized)
    has_harmless = bool(harmless.any())
    explicit = recipe.model.reference_model_name_or_path is not None
    check_harmless(training, harmless, model, other_reference=explicit, file=data.origin)
    if (checkpoint := checkpoint_to_resume(recipe)) is not None:
        check_planned(checkpoint, training, trained, harmless=has_harmless)
    if not has_harmless:
        unused = [name for name in recipe.given if name.startswith("harmless_")]
        if unused:
            notes.append(
                f"no row says `kind: harmless`, so {listed(unused)} {'have' if unused[1:] else 'has'} no effect: "
                "trained on harmful prompts alone, a model comes to refuse harmless ones, too"
            )
    notes.extend(
        f"{language_name(code)} has {counted(harmful, 'harmful pair')} and {answered or 'no'} harmless: a model that sees a "
        "language with refusals alone learns to refuse the language. Add harmless rows in it, or leave it out (`languages`)"
        for code, (harmful, answered) in without_harmless(tokenized).items()
    )
    taught = [name for name in training.objectives.names if name in _TEACH_TEXT]
    if taught and (shares := cut_short(tokenized, training.max_response_length)):
        listing = listed(f"{share:.0%} in {language_name(code)}" for code, share in shares.items())
        notes.append(
            f"`max_response_length: {training.max_response_length}` cuts chosen responses to harmful prompts short ({listing}), "
            f"and `{taught[0]}` teaches them as they then are: a refusal that stops in the middle. Raise it, or give shorter ones"
        )
    taught = training.harmless.objectives.names if training.harmless_loss_weight else []
    if taught and (refused := harmless_refused(train, training.harmless.train_on)):
        notes.append(
            f"{listed(f'{count} in {language_name(code)}' for code, count in sorted(refused.items()))} of the chosen responses to harmless "
            f"prompts refuse, and `harmless_loss_type: {taught[0]}` teaches them. Leave them out, or hold what the model does there "
            "without teaching it (`harmless_loss_type: none` with `harmless_retention: mixed_kl`)"
        )
    if training.harmless.keeps_tokens and (others := other_refusals(train)):
        notes.append(
            f"in {listed(language_name(code) for code in others)} the rejected responses to harmless prompts refuse in other words than the "
            f"chosen ones to harmful prompts, so `harmless_retention: {training.harmless_retention}` does not hold the refusals that are "
            "taught. Take the same ones for both"
        )
    languages = count_languages(tokenized)
    probe = prompts_of(training, languages)
    if training.behavior_probe:
        unknown = [training.source_language, *languages] if probe is None else probe.left_out
        if unknown:
            notes.append(
                f"the probe asks nothing in {listed(language_name(code) for code in unknown)}, so what the model does there is not measured"
            )
    check_tokens(tokenized, model, tokenizer)
    check_state_layer(training, model)
    work = count_work(tokenized, training)
    plan = Plan(
        recipe=recipe,
        source=source,
        config=config,
        tokenizer=tokenizer,
        peft_config=peft_config,
        data=data,
        train=train,
        held_out=held_out,
        tokenized=tokenized,
        dropped=dropped,
        trainable=trainable,
        parameters=parameters,
        work=work,
        languages=languages,
        held_out_pairs=held_out_pairs,
        schedule=schedule(work.group_tokens, training, training.world_size, work.harmless),
        probe=probe,
    )
    if held_out_work is not None:
        plan.in_between = measured_in_between(recipe, plan.schedule, work, held_out_work)
    plan.leaks = leaks_of(recipe, train, data.origin)
    if plan.leaks is not None and plan.leaks.pairs:
        found = [
            text
            for name, text in zip(plan.leaks.prompts, plan.leaks.summary(), strict=True)
            if plan.leaks.found(name)
        ]
        notes.append(f"{' '.join(found)} Their results will flatter the model (`leaks.json` lists them)")
    if held_out is None:
        if not training.behavior_probe:
            notes.append(
                "nothing is held out and nothing is asked, so what training does will not be measured"
            )
    elif shared := shared_sources(train, held_out):
        notes.append(
            f"{shared} of the prompts of `eval_dataset` are also trained on, which flatters the result"
        )
    if on_this_machine and not is_installed("matplotlib"):
        notes.append("no plots will be drawn: matplotlib is not installed (`pip install 'mpo-align[plots]'`)")
    space = disk_space(plan)
    plan.facts = facts_of(plan, space.total)
    if plan.leaks is not None and recipe.data.leak_against:
        plan.facts["Leaks"] = plan.leaks.short()
    plan.facts["Bad rows dropped"] = str(len(dropped) + len(errors))
    plan.notes = notes
    if on_this_machine:
        check_disk(plan, space)
    return plan
