"""What several ranks measure in step: gradients, steps and replicas under DDP and FSDP. Every rank runs this."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.capabilities import as_given
from lmconform.conventions import IGNORED
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

Stage = Callable[[str], None]
ROWS = 2  # per rank
TIME = 16
STEPS = 3
RATE = 1e-3


def measure_ddp(subject: Specimen, found: dict[str, Any], seed: int, stage: Stage) -> dict[str, Any]:
    """Gradients under DistributedDataParallel, then a few steps, then whether all ranks hold the same model."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    subject.can("ignored_label")  # asked before the model is wrapped, and kept
    stage("wrapping the model in DistributedDataParallel")
    places = [subject.device.index] if subject.device.type == "cuda" else None
    unused = torch.tensor(len(found["unused"]), device=subject.device)
    dist.all_reduce(unused, dist.ReduceOp.MAX)  # all ranks must say the same
    wrapped = DistributedDataParallel(subject.module, device_ids=places, find_unused_parameters=bool(unused))
    stage("comparing the ranks after DDP's first broadcast")
    found["apart_at_start"] = _apart(subject, seed)
    if any(found["apart_at_start"].values()):
        return found
    for name, batch in batches(subject, seed).items():
        stage(f"running forward and backward under DDP ({name} label counts)")
        for way in ways(subject, name):
            subject.module.zero_grad(set_to_none=True)
            _objective(subject, wrapped, _mine(batch), batch, way).backward()
            found["actual"][f"{name} {way}"] = _grads(subject.module)
    stage("taking optimizer steps under DDP")
    optimizer = torch.optim.AdamW([p for p in subject.module.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        batch = batches(subject, seed + 1 + step)["even"]
        optimizer.zero_grad(set_to_none=True)
        _objective(subject, wrapped, _mine(batch), batch, "mean").backward()
        optimizer.step()
    stage("comparing the ranks after the steps")
    found["apart_after_steps"] = _apart(subject, seed)
    return found


def measure_fsdp(subject: Specimen, found: dict[str, Any], seed: int, stage: Stage) -> dict[str, Any]:
    """The same under FSDP2 (fully_shard of every block and of the whole), and the state gathered after the steps."""
    import copy

    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    subject.can("ignored_label")  # asked before the model is sharded, and kept
    single = subject._derive(copy.deepcopy(subject.module))
    stage("sharding the model with fully_shard")
    mesh = init_device_mesh(subject.device.type, (dist.get_world_size(),))
    blocks = structure.blocks(subject.module)
    for block in blocks[1] if blocks is not None else ():
        for part in structure.called(block):
            fully_shard(part, mesh=mesh)
    fully_shard(subject.module, mesh=mesh)
    for name, batch in batches(subject, seed).items():
        stage(f"running forward and backward under FSDP ({name} label counts)")
        for way in ways(subject, name):
            subject.module.zero_grad(set_to_none=True)
            _objective(subject, subject.module, _mine(batch), batch, way).backward()
            found["actual"][f"{name} {way}"] = _grads(subject.module)
    stage("taking optimizer steps under FSDP")
    # SGD: its steps are linear in the gradient, so that rounding stays rounding
    trained = {"sharded": subject, "single": single}
    for which, each in trained.items():
        optimizer = torch.optim.SGD([p for p in each.module.parameters() if p.requires_grad], lr=RATE)
        for step in range(STEPS):
            batch = batches(subject, seed + 1 + step)["even"]
            optimizer.zero_grad(set_to_none=True)
            own = _mine(batch) if which == "sharded" else batch
            _objective(each, each.module, own, batch, "mean").backward()
            optimizer.step()
    stage("gathering the sharded weights into one process (a resume at world size 1)")
    state = get_model_state_dict(subject.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    ids = batches(subject, seed)["even"]["ids"]
    with torch.no_grad():
        sharded = subject.forward(ids).logits
        if dist.get_rank() == 0:
            expected = single.forward(ids).logits
            found["missing"] = sorted(set(single.module.state_dict()) - set(state))
            single.module.load_state_dict(state, strict=False)
            found["resumed"] = {
                "sharded": sharded.double().cpu(), "loaded": single.forward(ids).logits.double().cpu(),
                "single": expected.double().cpu(),
            }  # fmt: skip
    return found


Measure = Callable[["Specimen", dict[str, Any], int, Stage], dict[str, Any]]
MEASURES: dict[str, Measure] = {"ddp": measure_ddp, "fsdp": measure_fsdp}


# -- parts ---------------------------------------------------------------------------------------------------------


def alone(subject: Specimen, seed: int, stage: Stage, world: int) -> tuple[Specimen, dict[str, Any]]:
    """The subject without dropout, and what one process computes: gradients of the whole batch, twice.

    Called before the processes join: a model that asks torch.distributed must be told that there is nobody else.
    """
    import torch

    from lmconform.measuring.dropout import without_dropout

    stage("running forward and backward in one process")
    subject = without_dropout(subject)
    state = {name: buffer.clone() for name, buffer in subject.module.named_buffers()}
    found: dict[str, Any] = {"whole": {}, "floor": {}, "actual": {}}
    torch.manual_seed(seed)
    for name, batch in batches(subject, seed, world).items():
        turned = {key: value.flip(0) for key, value in batch.items()}
        for key, rows in (("whole", batch), ("floor", turned)):  # other order of rows: what rounding alone does
            subject.module.zero_grad(set_to_none=True)
            loss = _objective(subject, subject.module, rows, rows, "mean")
            if not loss.requires_grad:
                raise RuntimeError("the loss carries no gradient")
            loss.backward()
            found[key][name] = _grads(subject.module)
    found["unused"] = [n for n, p in subject.module.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        found["size"] = float(subject.forward(batches(subject, seed, world)["even"]["ids"]).logits.abs().max())
        for name, buffer in subject.module.named_buffers():  # statistics start again
            buffer.copy_(state[name])
    found["items"] = takes_items(subject)
    subject.module.zero_grad(set_to_none=True)
    return subject, found


def batches(subject: Specimen, seed: int, world: int | None = None) -> dict[str, dict[str, Tensor]]:
    """ids and labels [rows of all ranks, time]: every label counts, or very different numbers of them per rank."""
    import torch

    world = world or _world()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 17)
    time = subject.longest(TIME)
    ids = random_ids(subject.ordinary_ids, ROWS * world, time, generator)
    labels = random_ids(subject.ordinary_ids, ROWS * world, time, generator)
    uneven = labels.clone()
    for row in range(len(uneven)):
        kept = (time, time - 3, 3, 2)[row * 4 // len(uneven)]
        uneven[row, : time - kept] = IGNORED
    return {
        "even": {"ids": ids.to(subject.device), "labels": labels.to(subject.device)},
        "uneven": {"ids": ids.to(subject.device), "labels": uneven.to(subject.device)},
    }


def ways(subject: Specimen, name: str) -> tuple[str, ...]:
    """How the rank's loss is weighted before the ranks' gradients are averaged.

    mean: each rank's own mean. share: times its share of the labels and the number of ranks, as a training loop must.
    items: the model is told the number of labels in all ranks.
    """
    if name == "even":
        return ("mean",)
    return ("share", "mean", "items") if takes_items(subject) else ("share", "mean")


def takes_items(subject: Specimen) -> bool:
    """Whether forward() offers num_items_in_batch by name or by **kwargs, and a loss to give it to."""
    from lmconform.conventions import parameters_of

    if subject.convention.labels is None or not subject.convention.labels_shifted or subject.convention.call:
        return False
    if getattr(subject.module, "accepts_loss_kwargs", True) is False:
        return False
    named, _, keywords = parameters_of(subject.module)
    transformers_own = keywords and callable(getattr(subject.module, "loss_function", None))
    return "num_items_in_batch" in named or transformers_own


def _mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch.distributed as dist

    rows = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    return {name: tensor[rows] for name, tensor in batch.items()}


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size()


def _count(subject: Specimen, labels: Tensor) -> int:
    return int((labels[:, 1:] if subject.convention.labels_shifted else labels).ne(IGNORED).sum())


def _objective(
    subject: Specimen, module: nn.Module, rows: dict[str, Tensor], whole: dict[str, Tensor], way: str
) -> Tensor:
    """The loss of these rows, in train mode: the model's own, or cross-entropy of its logits where it has none."""
    from torch.nn import functional as F

    subject.module.train()
    module.train()
    count, total = _count(subject, rows["labels"]), _count(subject, whole["labels"])
    world = len(whole["labels"]) // len(rows["labels"])
    convention = subject.convention
    if convention.labels is None:
        logits = convention.run(module, rows["ids"], use_cache=False).logits
        wanted = rows["labels"]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=IGNORED)
    elif way == "items":
        ids = {convention.ids: rows["ids"]} if convention.ids is not None else {}
        output = module(**ids, **{convention.labels: rows["labels"]}, num_items_in_batch=total, use_cache=False)
        return output.loss * world
    else:
        output_ = convention.run(module, rows["ids"], labels=as_given(subject, rows["labels"]), use_cache=False)
        if output_.loss is None:
            raise RuntimeError("labels were given and no loss came back")
        loss = output_.loss
    return loss * (count * world / total) if way == "share" else loss


def _grads(module: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, on the CPU; sharded ones are gathered, so every rank must call this."""
    grads: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is None:
            continue
        gather = getattr(grad, "full_tensor", None)
        grads[name] = (gather() if gather is not None else grad).detach().clone().cpu()
    return grads


def _apart(subject: Specimen, seed: int) -> dict[str, float]:
    """By name of parameter or buffer, and "logits": the largest difference between any rank and rank 0."""
    import torch
    import torch.distributed as dist

    subject.module.eval()
    with torch.no_grad():
        logits = subject.forward(batches(subject, seed)["even"]["ids"]).logits
        tensors = {**dict(subject.module.named_parameters()), **dict(subject.module.named_buffers()), "logits": logits}
        apart: dict[str, float] = {}
        for name, tensor in tensors.items():
            if not tensor.numel():
                continue
            mine = tensor.detach().double() if not tensor.is_complex() else torch.view_as_real(tensor.detach()).double()
            first = mine.clone()
            dist.broadcast(first, 0)
            difference = (mine.nan_to_num() - first.nan_to_num()).abs().max()
            dist.all_reduce(difference, dist.ReduceOp.MAX)
            apart[name] = float(difference)
    return apart
