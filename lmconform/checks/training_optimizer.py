"""training.optimizer and training.weight_decay: which parameters the optimizer holds, and how it decays them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import nn

    from lmconform.context import Context
    from lmconform.recipe import Recipe
    from lmconform.specimen import Specimen


@register_check(
    "training.optimizer",
    holds="the optimizer covers the live parameters once each; groups and decay as stated",
    needs=("recipe",),
    requires=(),
    profile="smoke",
)
def check_optimizer(subject: Specimen, ctx: Context) -> None:
    """Compared by identity with the parameters that the model has after make_optimizer(model) has returned.

    A resize, a re-tied or replaced head, LoRA injection after the optimizer was made: the optimizer then updates
    tensors that nobody reads, and the loss falls all the same.
    """
    recipe = subject.recipe
    recipe.need("make_optimizer")
    module = subject.copy().module
    optimizers = made_optimizers(ctx, recipe, module)
    live = {id(p): name for name, p in module.named_parameters()}
    trainable = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    held_ids = [id(p) for p in held]
    missing = [name for key, name in trainable.items() if key not in held_ids]
    stale = [p for p in held if id(p) not in live]
    if stale:
        also = f", and {_list(missing)} {'is' if len(missing) == 1 else 'are'} not in it" if missing else ""
        ctx.fail(
            f"the optimizer holds {len(stale)} tensor{'s' if len(stale) > 1 else ''} that "
            f"{'are' if len(stale) > 1 else 'is'} no parameter of the model "
            f"(the first of shape {list(stale[0].shape)}){also}",
            where=missing[0] if missing else "",
            hint=Hint(
                "the optimizer was made before the model got its final parameters (resize_token_embeddings, a new or "
                "re-tied head, an adapter, a copy, another dtype): make it last",
                "optimizer.stale_parameters",
            ),
        )
    if missing:
        ctx.fail(
            f"{len(missing)} trainable parameter{'s are' if len(missing) > 1 else ' is'} not in the optimizer: "
            f"{_list(missing)}",
            where=missing[0],
            hint=Hint(
                "the groups are picked by name or type and some fall through (a norm that is not nn.LayerNorm, a raw "
                "nn.Parameter, a tied head); what is meant to stay fixed should have requires_grad=False",
                "optimizer.missing_parameters",
            ),
        )
    twice = [live[key] for key in dict.fromkeys(held_ids) if held_ids.count(key) > 1]
    if twice:
        ctx.fail(
            f"{_list(twice)} {'is' if len(twice) == 1 else 'are'} in the optimizer more than once",
            where=twice[0],
            hint=Hint(
                "a tied weight has two names (use named_parameters() as it is, without remove_duplicate=False), or "
                "two optimizers share it",
                "optimizer.stale_parameters",
            ),
        )
    frozen = [live[id(p)] for p in held if not p.requires_grad]
    if frozen:
        ctx.note(f"{len(frozen)} frozen parameters are in the optimizer ({_list(frozen)}): they take no update")
    _check_stated_decay(ctx, recipe, optimizers, live)


def made_optimizers(ctx: Context, recipe: Recipe, module: nn.Module) -> list[Any]:
    """What make_optimizer gives. Violation where it raises."""
    import torch

    module.train()
    try:
        with torch.enable_grad():
            return list(recipe.optimizers(module))
    except TypeError as error:
        if "param_groups" in str(error):
            ctx.not_applicable(str(error))
        ctx.fail(f"make_optimizer(model) raised TypeError: {first_line(error)}")
    except ValueError as error:
        duplicate = "more than one parameter group" in str(error)
        ctx.fail(
            f"make_optimizer(model) raised ValueError: {first_line(error)}",
            hint=Hint("a tied weight, or one that two rules match, is in two groups", "optimizer.stale_parameters")
            if duplicate
            else "",
        )
    raise AssertionError("unreachable")


def _check_stated_decay(ctx: Context, recipe: Recipe, optimizers: list[Any], live: dict[int, str]) -> None:
    stated = recipe.weight_decay
    decays = [
        (live[id(p)], p, float(group.get("weight_decay") or 0))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    if stated is not None:
        wrong = [(name, decay) for name, _, decay in decays if decay not in (0.0, float(stated))]
        if wrong or (stated and not any(decay for _, _, decay in decays)):
            name, decay = wrong[0] if wrong else (decays[0][0], 0.0)
            ctx.fail(
                f"the recipe states a weight decay of {stated:g}, and {name} gets {decay:g}",
                where=name,
                hint=Hint(
                    "the decay is not passed on (AdamW's default is 0.01, Adam's 0), or a group overrides it",
                    "optimizer.decays_norms",
                ),
            )
    if recipe.no_decay is None:
        return
    for name, parameter, decay in decays:
        wanted = recipe.decays(name, parameter)
        if wanted is False and decay:
            ctx.fail(
                f"{name} is decayed by {decay:g}, though the recipe states that it is not",
                where=name,
                hint=Hint(
                    "the names in the no-decay list are another model's (LayerNorm.weight, ln_f, norm.weight): select "
                    "by p.dim() >= 2 instead",
                    "optimizer.decays_norms",
                ),
            )
        if wanted and not decay and stated:
            ctx.fail(f"{name} is not decayed, though the recipe states that it is", where=name)


@register_check(
    "training.weight_decay",
    holds="biases and normalisation scales are not decayed, unless the recipe states what is",
    needs=("recipe",),
    requires=(),
    profile="smoke",
    severity="warning",
)
def check_weight_decay(subject: Specimen, ctx: Context) -> None:
    """A convention, not a law: GPT-2, GPT-3, LLaMA's successors and transformers' Trainer leave them out.

    AdamW(model.parameters(), weight_decay=...) decays all. Where the recipe states `no_decay`, training.optimizer
    compares with that, and this has nothing to say.
    """
    recipe = subject.recipe
    recipe.need("make_optimizer")
    if recipe.no_decay is not None:
        ctx.not_applicable("the recipe states what is left out of the decay (no_decay); see training.optimizer")
    module = subject.copy().module
    optimizers = made_optimizers(ctx, recipe, module)
    small = {id(p): name for name, p in module.named_parameters() if p.dim() < 2 and not _raw(module, name)}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("weight_decay")]
    if not groups:
        ctx.not_applicable("nothing is decayed")
    decayed = [small[id(p)] for group in groups for p in group["params"] if id(p) in small]
    if decayed:
        ctx.fail(
            f"weight decay {groups[0]['weight_decay']:g} is applied to {len(decayed)} biases and normalisation scales "
            f"({_list(decayed)})",
            where=decayed[0],
            hint=Hint(
                "put parameters with p.dim() < 2 into a group with weight_decay=0; if it is meant, say so: "
                "Recipe(no_decay=())",
                "optimizer.decays_norms",
            ),
        )
    for optimizer in optimizers:
        if type(optimizer).__name__ == "Adam" and not optimizer.defaults.get("decoupled_weight_decay"):
            ctx.note("Adam adds the decay to the gradient (L2), which its scaling then undoes: AdamW is meant for it")


def _raw(module: nn.Module, name: str) -> bool:
    """Whether that parameter is neither a bias nor a norm's: a decay rate, a gate, a scale of its own."""
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    return leaf != "bias" and not (leaf == "weight" and "norm" in f"{type(part).__name__} {owner}".lower())


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
