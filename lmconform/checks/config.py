"""config: fields do what their names say."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.copies import cast
from lmconform.registry import COMPARES_LOGITS, register_check
from lmconform.specimen import Specimen

if TYPE_CHECKING:
    from torch import nn

    from lmconform.context import Context

NORM = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon",
    "rms_norm_epsilon", "layernorm_eps",
)  # fmt: skip
ACTIVATION = ("hidden_act", "activation_function", "hidden_activation", "activation", "afn")
FACTOR = (
    "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "routed_scaling_factor", "query_pre_attn_scalar", "lm_head_multiplier",
)  # fmt: skip
SOFTCAP = ("attn_logit_softcapping", "final_logit_softcapping")
SWITCH = ("scale_attn_weights", "scale_embedding", "norm_topk_prob", "use_parallel_residual", "parallel_attn")
EXPERTS = ("n_expert", "num_experts", "n_experts", "n_routed_experts", "num_local_experts")
BASE = ("rope_theta", "rotary_emb_base")
DROPOUT = (
    "attention_dropout", "attn_pdrop", "attn_dropout", "hidden_dropout", "resid_pdrop", "resid_dropout", "embd_pdrop",
    "emb_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "activation_dropout",
    "embedding_dropout", "residual_dropout", "attention_dropout_prob", "embed_dropout",
)  # fmt: skip
PRIVATE = ("torch_dtype", "dtype", "transformers_version", "model_type", "architectures", "name_or_path")


@dataclass(frozen=True)
class Knob:
    """A field, the value to try, and the axis on which it must then be seen. `expected`: by its well-known name."""

    field: str
    value: Any
    axis: str  # logits, train, cache, loss, ties, or any
    expected: bool = True


@register_check(
    "config.knobs",
    holds="each config field moves the axis it belongs to (logits, train mode, loss, cache, metadata)",
    needs=("config",),
    severity="warning",
    requires=COMPARES_LOGITS,
)
def check_knobs(subject: Specimen, ctx: Context) -> None:
    """The model built again from a config in which one field differs, with the same weights where shapes allow.

    Fields whose well-known name says what they do must do it: norm epsilons, activation, rotary base, windows,
    softcaps and multipliers move the logits, dropout moves the training logits, `use_cache` the cache, tying the
    parameters. In the thorough profile every other scalar field is tried too, and those that move nothing are listed.
    """
    build = _rebuilder(subject, ctx)
    base = _Axes(subject, build({}), ctx)
    knobs = [knob for knob in _knobs(subject.config) if knob.axis != "cache" or subject.can("cache")]
    whole = getattr(subject.module, "config", None)
    if whole is not subject.config and isinstance(tied := _value(whole or {}, "tie_word_embeddings"), bool):
        # a composite's own field decides, whatever its text part says
        knobs = [Knob(knob.field, not tied, knob.axis) if knob.axis == "ties" else knob for knob in knobs]
    if ctx.profile == "thorough":
        known = {knob.field for knob in knobs}
        knobs += [knob for knob in _others(subject.config) if knob.field not in known]
    if not knobs:
        ctx.not_applicable("the config has no field whose effect is known")
    inert: list[Knob] = []
    tried = 0
    for knob in knobs:
        try:
            module = build({knob.field: knob.value})
            moved = base.moved(module, knob.axis)
        except Exception as error:
            if knob.expected:
                reason = f"{type(error).__name__}: {first_line(error)[:80]}"
                ctx.note(f"{knob.field}={knob.value!r} cannot be tried ({reason})")
            continue
        tried += 1
        if not moved:
            inert.append(knob)
    if tried == 0:
        ctx.not_applicable("no field could be changed: " + "; ".join(ctx.notes))
    if listed := [knob.field for knob in inert if not knob.expected]:
        ctx.note("fields that move no axis: " + ", ".join(listed))
    silent = [knob for knob in inert if knob.expected]
    if silent:
        effects = {"logits": "the logits", "train": "the logits in train mode", "cache": "whether a cache comes back",
                   "loss": "the loss", "ties": "which weights are shared"}  # fmt: skip
        first = silent[0]
        ctx.fail(
            f"config field {first.field} does nothing: {first.field}={first.value!r} instead of "
            f"{_value(subject.config, first.field)!r} leaves {effects[first.axis]} as they were"
            + (f" (nor do {', '.join(knob.field for knob in silent[1:])})" if silent[1:] else ""),
            where=", ".join(knob.field for knob in silent),
            hint=Hint(
                "the value is written into the code instead of read from the config, or the field is read under "
                "another name",
                "config.unread",
            ),
        )


# -- building again ----------------------------------------------------------------------------------------------------


def _rebuilder(subject: Specimen, ctx: Context) -> Callable[[dict[str, Any]], nn.Module]:
    """`build(changes)` -> the same model from a changed config; leaves the check where that is not possible."""
    import torch

    holder = "config" if getattr(subject.module, "config", None) is not None else "cfg"
    whole = getattr(subject.module, holder)
    weights = subject.module.state_dict()

    def build(changes: dict[str, Any]) -> nn.Module:
        changed = copy.deepcopy(whole)
        for name, value in changes.items():
            _set(_text_part(changed), name, value)
            if _text_part(changed) is not changed and name in vars(changed):  # a composite has some fields twice
                setattr(changed, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = type(subject.module)(changed)
        module = cast(module.to(subject.device), subject.dtype).eval()
        own = module.state_dict()
        fitting = {
            name: tensor for name, tensor in weights.items()
            if name in own and isinstance(tensor, torch.Tensor) and own[name].shape == tensor.shape
        }  # fmt: skip
        module.load_state_dict(fitting, strict=False)
        return module

    ids = subject.probe_ids(2, subject.longest(9))
    try:
        again = subject.convention.run(build({}), ids, use_cache=False).logits
    except Exception as error:
        ctx.not_applicable(
            f"{type(subject.module).__name__}(config) does not build it again ({type(error).__name__}: "
            f"{first_line(error)[:80]})"
        )
    expected = subject.logits(ids)
    if again.shape != expected.shape or float((again - expected).detach().abs().max()) > tolerance.allowed(
        subject.noise, expected
    ):
        ctx.not_applicable(f"{type(subject.module).__name__}(config) with the same weights is another model")
    return build


def _text_part(config: Any) -> Any:
    get_text = getattr(config, "get_text_config", None)
    return get_text(decoder=True) if callable(get_text) else config


def _value(config: Any, name: str) -> Any:
    holder = config if isinstance(config, dict) else vars(config)
    if name in holder:
        return holder[name]
    parameters = holder.get("rope_parameters")
    if isinstance(parameters, dict):
        if name in parameters:
            return parameters[name]
        nested = [part[name] for part in parameters.values() if isinstance(part, dict) and name in part]
        return nested[0] if nested else None
    return None


def _set(config: Any, name: str, value: Any) -> None:
    """Set the field, wherever it lives; a rotary base in every layer kind's own table."""
    if isinstance(config, dict):
        config[name] = value
        return
    parameters = getattr(config, "rope_parameters", None)
    if name in BASE and isinstance(parameters, dict):
        for part in (parameters, *parameters.values()):
            if isinstance(part, dict) and name in part:
                part[name] = value
    if name in vars(config) or not isinstance(parameters, dict):
        setattr(config, name, value)


# -- axes --------------------------------------------------------------------------------------------------------------


class _Axes:
    """What the unchanged model shows on each axis, and whether another one shows something else."""

    def __init__(self, subject: Specimen, module: nn.Module, ctx: Context) -> None:
        self.subject = subject
        self.ids = ctx.ids(2, subject.longest(40))
        self.module = module
        self._seen: dict[str, Any] = {}

    def moved(self, module: nn.Module, axis: str) -> bool:
        """Whether `module` differs from the unchanged model on that axis ("any": on one of them)."""
        if axis == "any":
            return any(self.moved(module, one) for one in ("ties", "logits", "train", "cache", "loss"))
        if axis not in self._seen:
            self._seen[axis] = self._measure(self.module, axis)
        return _differ(self._seen[axis], self._measure(module, axis))

    def _measure(self, module: nn.Module, axis: str) -> Any:
        import torch

        if axis == "ties":
            owners = [(p.data_ptr(), name) for name, p in module.named_parameters(remove_duplicate=False)]
            names: dict[int, list[str]] = {}
            for place, name in owners:
                names.setdefault(place, []).append(name)
            return sorted(names.values()), [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        convention = self.subject.convention
        module.train(axis == "train")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if axis == "cache":
                return convention.run(module, self.ids[:, :3]).cache is not None
            if axis == "loss":
                if convention.labels is None:
                    return None
                return convention.run(module, self.ids, labels=self.ids).loss
            return convention.run(module, self.ids, use_cache=False).logits


def _differ(one: Any, other: Any) -> bool:
    """Values differ in any bit: with the same weights, seed and shapes, an unread field leaves every bit alone."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(one, other)
    return bool(one != other)


# -- fields ------------------------------------------------------------------------------------------------------------


def _knobs(config: Any) -> Iterator[Knob]:
    """Fields with a well-known meaning that this config states and uses."""
    for name in NORM:
        if isinstance(_value(config, name), float):
            yield Knob(name, 0.5, "logits")
    for name in ACTIVATION:
        value = _value(config, name)
        if isinstance(value, str):
            yield Knob(name, "relu" if value.lower() not in ("relu", "relu2", "relu_squared") else "silu", "logits")
    for name in BASE:
        value = _value(config, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and _rotates(config):
            yield Knob(name, float(value) / 64, "logits")
    for name in SOFTCAP:
        if isinstance(value := _value(config, name), int | float) and not isinstance(value, bool):
            yield Knob(name, value / 64, "logits")
    for name in FACTOR:
        if name == "routed_scaling_factor" and any(_value(config, experts) == 0 for experts in EXPERTS):
            continue  # one config class for dense models and mixtures, as in litgpt
        if isinstance(value := _value(config, name), int | float) and not isinstance(value, bool):
            yield Knob(name, value * 2 if value else 2.0, "logits")
    for name in SWITCH:
        if isinstance(value := _value(config, name), bool) and (name != "norm_topk_prob" or _routes(config)):
            yield Knob(name, not value, "logits")
    if _windowed(config):
        yield Knob("sliding_window", max(1, _value(config, "sliding_window") // 4), "logits")
    for name in DROPOUT:
        if isinstance(value := _value(config, name), int | float) and not isinstance(value, bool):
            yield Knob(name, 0.5 if value != 0.5 else 0.1, "train")
    value = _value(config, "output_router_logits")
    if isinstance(value, bool) and _value(config, "router_aux_loss_coef") and _routes(config):
        yield Knob("output_router_logits", not value, "loss")
    if isinstance(value := _value(config, "use_cache"), bool):
        yield Knob("use_cache", not value, "cache")
    if isinstance(value := _value(config, "tie_word_embeddings"), bool):
        yield Knob("tie_word_embeddings", not value, "ties")


def _rotates(config: Any) -> bool:
    """Whether nothing that the config states switches rotation off or overrides its base."""
    if _value(config, "layer_rope_theta") or _value(config, "use_mem_rope") is False:
        return False
    if _value(config, "qk_rope_head_dim") == 2:  # one pair turns by one radian a position, whatever the base
        return False
    named = "position_embedding_type" in (config if isinstance(config, dict) else vars(config))
    return not named or _value(config, "position_embedding_type") == "rope"


def _routes(config: Any) -> bool:
    """Whether a router of experts is in use, with more than one expert a token."""
    each = next((n for n in ("num_experts_per_tok", "top_k_experts", "moe_topk") if _value(config, n)), None)
    scored_apart = _value(config, "expert_selection_fn") == "softmax"  # over the chosen experts: normalised as it is
    return _value(config, "is_moe") is not False and not scored_apart and each is not None and _value(config, each) != 1


def _windowed(config: Any) -> bool:
    """Whether a sliding window is stated, switched on and used by a layer."""
    value = _value(config, "sliding_window")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return False
    kinds = _value(config, "layer_types")
    return _value(config, "use_sliding_window") is not False and (
        not isinstance(kinds, list) or any("sliding" in str(kind) for kind in kinds)
    )


def _others(config: Any) -> Iterator[Knob]:
    """Every other scalar field, moved a little; sizes change shapes, and that is an axis too."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    else:
        fields = dict(config) if isinstance(config, dict) else dict(vars(config))
    for name, value in fields.items():
        if name.startswith("_") or name in PRIVATE:
            continue
        if isinstance(value, bool):
            yield Knob(name, not value, "any", expected=False)
        elif isinstance(value, int):
            yield Knob(name, value * 2 if value else 1, "any", expected=False)
        elif isinstance(value, float):
            yield Knob(name, value * 2 if value else 0.5, "any", expected=False)
