"""The simulated accelerator as such: what it answers, and that sound programs run on it with the CPU's values."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmconform.shrinking import Unshrinkable, causal_types, tiny_model
from lmconform.simulated import PlacementError, simulated_accelerator, split_layers

# One type for each way of keeping state and of choosing a path by device.
FEW = [
    "llama", "gpt2", "gptj", "bloom", "mpt", "bart", "xlnet", "kolibri1", "mixtral", "deepseek_v3", "gpt_oss", "gemma2",
    "gemma3n_text", "mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "qwen3_next", "kimi_linear", "falcon_h1",
]  # fmt: skip

UNREPEATABLE = {"reformer"}  # draws a new seed of its own for every training step
NO_CACHE = {"reformer"}  # generate() fails with its cache on any device
NO_GENERATE = {"musicgen", "musicgen_melody"}  # the decoder alone cannot generate on any device


def _ids(model: nn.Module) -> Tensor:
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (2, 20), generator=torch.Generator().manual_seed(0))


def _run(model: Any, ids: Tensor, generate: bool = True, **generation: Any) -> dict[str, Any]:
    """Logits, gradients and greedy text, all on the CPU."""
    where = ids.device
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.device == where
    tokens = ids
    if generate:
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0, **generation
        )
    assert tokens.device == where
    model.train()
    model.config.use_cache = False  # a cache that is written in place cannot be differentiated through
    torch.manual_seed(0)
    F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.device == where
            gradients[name] = parameter.grad.cpu()
    return {"logits": logits.cpu(), "tokens": tokens.cpu(), "gradients": gradients}


def _compare(model_type: str) -> None:
    plain, moved = tiny_model(model_type), tiny_model(model_type)
    ids = _ids(plain)
    generation: dict[str, Any] = {"use_cache": False} if model_type in NO_CACHE else {}
    generation["generate"] = model_type not in NO_GENERATE
    expected = _run(plain, ids, **generation)
    with simulated_accelerator():
        actual = _run(moved.to("cuda"), ids.to("cuda"), **generation)
    assert torch.equal(actual["logits"], expected["logits"])
    assert torch.equal(actual["tokens"], expected["tokens"])
    assert actual["gradients"].keys() == expected["gradients"].keys()
    if model_type not in UNREPEATABLE:
        for name, gradient in expected["gradients"].items():
            assert torch.equal(actual["gradients"][name], gradient), name


@pytest.mark.parametrize("model_type", FEW)
def test_transformers_run_with_the_values_of_the_cpu(model_type: str) -> None:
    _compare(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in causal_types() if name not in FEW])
def test_every_type_runs_with_the_values_of_the_cpu(model_type: str) -> None:
    try:
        tiny_model(model_type)
    except Unshrinkable as error:
        pytest.skip(str(error))
    _compare(model_type)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("model_type", ["gemma2", "jamba", "bart"])
def test_generate_with_every_cache(model_type: str, cache: str, devices: int) -> None:
    model = tiny_model(model_type)
    ids = _ids(model)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with simulated_accelerator(devices) as accelerator:
        split_layers(model, accelerator.devices)
        tokens = model.generate(
            ids.cuda(), max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation=cache
        )
        assert tokens.is_cuda
        assert torch.equal(tokens.cpu(), expected)


def test_sampling_draws_what_the_cpu_draws() -> None:
    model = tiny_model("llama")
    ids = _ids(model)
    torch.manual_seed(3)
    expected = model.generate(ids, max_new_tokens=6, do_sample=True, pad_token_id=0)
    with simulated_accelerator():
        model.to("cuda")
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids.cuda(), max_new_tokens=6, do_sample=True, pad_token_id=0).cpu(), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention(attention: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    ids = torch.cat([_ids(model)] * 2)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits if attention != "flex_attention" else None
        with simulated_accelerator():
            actual = model.cuda()(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits
            assert actual.is_cuda
            assert expected is None or torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_layers_split_over_two_devices(model_type: str) -> None:
    plain, split = tiny_model(model_type), tiny_model(model_type)
    ids = _ids(plain)
    expected = _run(plain, ids)
    with simulated_accelerator(devices=2) as accelerator:
        split_layers(split, accelerator.devices)
        assert {str(parameter.device) for parameter in split.parameters()} == {"cuda:0", "cuda:1"}
        with torch.no_grad():
            assert torch.equal(split(input_ids=ids.cuda()).logits.cpu(), expected["logits"])
        tokens = split.generate(ids.cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens.cpu(), expected["tokens"])
        split.train()
        torch.manual_seed(0)
        F.cross_entropy(split(input_ids=ids.cuda()).logits.flatten(0, 1), ids.cuda().flatten()).backward()
        for name, parameter in split.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.device == parameter.device
                assert torch.equal(parameter.grad.cpu(), expected["gradients"][name])


def test_half_of_the_model_on_another_device_is_refused() -> None:
    model = tiny_model("llama")
    with simulated_accelerator(devices=2):
        model.to("cuda:0")
        model.model.layers[1].to("cuda:1")
        ids = _ids(model).to("cuda:0")
        with pytest.raises(PlacementError) as caught:
            model(input_ids=ids)
    assert caught.value.stray is not None
    assert caught.value.stray.name.startswith("model.layers.1.")
    assert caught.value.stray.place == "cuda:1"


def test_runtime_answers() -> None:
    before = torch.cuda.is_available(), torch.cuda.device_count()
    with simulated_accelerator(devices=2) as accelerator:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize()
        torch.cuda.set_device(1)
        assert torch.ones(1).cuda().device == torch.device("cuda:1")
        with torch.cuda.device(0):
            assert torch.ones(1, device="cuda").get_device() == 0
        assert torch.cuda.get_device_name() == "simulated accelerator"
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
        assert torch.Generator(device="cuda").device.type == "cuda"
        assert torch.device(1) == torch.device("cuda:1")
        assert isinstance(torch.device("cuda"), torch.device)
        assert pickle.loads(pickle.dumps(torch.device("cuda:1"))) == torch.device("cuda:1")
        assert [str(device) for device in accelerator.devices] == ["cuda:0", "cuda:1"]
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == before


def test_default_device_and_device_contexts() -> None:
    with simulated_accelerator():
        with torch.device("cuda"):
            assert torch.zeros(2).is_cuda
            layer = nn.Linear(2, 2)
            assert torch.tensor([1.0]).is_cuda
            assert not torch.zeros(2, device="cpu").is_cuda
        assert layer.weight.is_cuda
        assert not torch.zeros(2).is_cuda
        torch.set_default_device("cuda")
        try:
            assert torch.arange(3).is_cuda
            assert torch.get_default_device() == torch.device("cuda:0")
            assert layer(torch.ones(1, 2)).is_cuda
        finally:
            torch.set_default_device(None)
        assert not torch.arange(3).is_cuda


def test_moves_keep_or_copy_as_pytorch_does() -> None:
    with simulated_accelerator():
        tensor = torch.ones(3)
        there = tensor.cuda()
        there.add_(1)
        assert tensor.sum() == 3
        assert there.to("cuda") is there
        assert there.cuda() is there
        assert tensor.cpu() is tensor
        back = there.cpu()
        back.zero_()
        assert there.sum() == 6
        assert there.to(torch.float16).is_cuda
        assert there.to("cuda", torch.float64).dtype == torch.float64


MOVES: dict[str, Callable[[Any], Any]] = {
    "by_place": lambda thing: thing.to("cuda"),
    "keyword": lambda thing: thing.to(device="cuda"),
    "device": lambda thing: thing.to(torch.device("cuda", 0)),
    "number": lambda thing: thing.to(0),
    "with dtype": lambda thing: thing.to("cuda", torch.float64),
    "both keywords": lambda thing: thing.to(device=torch.device("cuda"), dtype=torch.float64, non_blocking=True),
    "like a tensor": lambda thing: thing.to(torch.ones(1, device="cuda", dtype=torch.float64)),
    "cuda": lambda thing: thing.cuda(),
    "cuda with number": lambda thing: thing.cuda(0),
    "cuda with keyword": lambda thing: thing.cuda(device="cuda:0"),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_way_to_move(move: str) -> None:
    with simulated_accelerator():
        layer, tensor = nn.Linear(2, 2), torch.ones(2)
        MOVES[move](layer)
        moved = MOVES[move](tensor)
        assert layer.weight.device == layer.bias.device == moved.device == torch.device("cuda:0")
        assert layer.weight.dtype == moved.dtype
        assert not tensor.is_cuda
        assert (layer.weight.dtype == torch.float64) == ("dtype" in move or move in ("both keywords", "like a tensor"))
        layer.to(device="cpu")
        assert not layer.weight.is_cuda


def test_tied_weights_stay_tied() -> None:
    model = tiny_model("gpt2")
    with simulated_accelerator():
        model.to("cuda")
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight.is_cuda
        model.half()
        assert model.lm_head.weight.is_cuda


def test_copies_and_pickles_keep_their_place() -> None:
    with simulated_accelerator():
        model = tiny_model("llama").to("cuda")
        ids = _ids(model).cuda()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {tensor.device.type for tensor in [*other.parameters(), *other.buffers()]} == {"cuda"}
            assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        for target, expected in ((None, "cuda"), ("cpu", "cpu"), ("cuda:0", "cuda")):
            saved.seek(0)
            loaded = torch.load(saved, map_location=target)
            assert {tensor.device.type for tensor in loaded.values()} == {expected}
    saved.seek(0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
            torch.load(saved)


def test_meta_tensors_are_filled_on_the_device() -> None:
    with simulated_accelerator():
        with torch.device("meta"):
            layer = nn.Linear(3, 3)
        assert layer.weight.is_meta
        layer.to_empty(device="cuda")
        assert layer.weight.device == torch.device("cuda:0")


def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    ids = _ids(model)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    last = model.config.num_hidden_layers - 1
    layers = {f"model.layers.{number}": 0 for number in range(last)}
    split = {
        "model.embed_tokens": 0, **layers, f"model.layers.{last}": 1, "model.norm": 1, "model.rotary_emb": 0,
        "lm_head": 1,
    }  # fmt: skip
    with simulated_accelerator(devices=2):
        for device_map in ({"": "cuda:0"}, split):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
            assert torch.equal(loaded(input_ids=ids.cuda()).logits.cpu(), expected)


def test_training_step_with_optimizer_checkpointing_and_autocast() -> None:
    results = []
    for device in ("cpu", "cuda"):
        with simulated_accelerator():
            model = tiny_model("llama").to(device).train()
            model.gradient_checkpointing_enable()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            ids = _ids(model).to(device)
            for _ in range(2):
                with torch.autocast(device, dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            results.append(model.lm_head.weight.detach().cpu())
    # The fused and the looped optimizer of the two devices need not agree to the last bit.
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_gradients_hooks_and_higher_orders() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
            ctx.save_for_backward(factor)
            return x * factor

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            (factor,) = ctx.saved_tensors
            assert gradients[0].is_cuda
            return gradients[0] * factor + torch.zeros(3, device=factor.device), None

    with simulated_accelerator():
        x = torch.ones(3, device="cuda", requires_grad=True)
        seen = []
        x.register_hook(lambda gradient: seen.append(gradient.device))
        Scale.apply(x, torch.tensor([1.0, 2.0, 3.0], device="cuda")).sum().backward()
        assert x.grad is not None
        assert x.grad.is_cuda
        assert seen == [torch.device("cuda:0")]
        (gradient,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        assert gradient.is_cuda
        (second,) = torch.autograd.grad((gradient * x).sum(), x)
        assert second.is_cuda
        assert torch.equal(second.cpu(), torch.full((3,), 9.0))


def test_gradients_cross_devices() -> None:
    with simulated_accelerator(devices=2):
        first = torch.ones(3, device="cuda:0", requires_grad=True)
        second = torch.ones(3, device="cuda:1", requires_grad=True)
        (first.to("cuda:1") * second).sum().cpu().backward()
        assert first.grad is not None
        assert second.grad is not None
        assert (str(first.grad.device), str(second.grad.device)) == ("cuda:0", "cuda:1")
        first.data.add_(first.grad)


def test_recurrent_layers_with_packed_input() -> None:
    layer = nn.LSTM(4, 5, batch_first=True)
    inputs = torch.randn(2, 6, 4)
    expected = layer(nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor([6, 4]), batch_first=True))[0].data
    with simulated_accelerator():
        layer.cuda()
        packed = nn.utils.rnn.pack_padded_sequence(inputs.cuda(), torch.tensor([6, 4]), batch_first=True)
        assert not packed.batch_sizes.is_cuda
        output = layer(packed)[0]
        assert output.data.is_cuda
        assert torch.equal(output.data.cpu(), expected)
        assert nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0].is_cuda
        assert layer(inputs.cuda())[0].is_cuda


def test_attention_module_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    inputs = torch.randn(2, 5, 8)
    with simulated_accelerator():
        layer.cuda()
        mask = nn.Transformer.generate_square_subsequent_mask(5, device=torch.device("cuda"))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert layer(inputs.cuda(), src_mask=mask).is_cuda
                with pytest.raises(PlacementError):
                    layer(inputs)


def test_functional_transforms() -> None:
    layer = nn.Linear(3, 3)
    inputs = torch.ones(4, 3)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (row,)).sum()

    with simulated_accelerator():
        layer.cuda()
        parameters = {name: value.detach() for name, value in layer.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs.cuda())
        assert all(gradient.is_cuda for gradient in gradients.values())


def test_nesting_is_one_accelerator() -> None:
    with simulated_accelerator() as outer, simulated_accelerator() as inner:
        assert inner is outer
    with simulated_accelerator(), pytest.raises(RuntimeError, match="is simulated already"):
        simulated_accelerator(devices=2).__enter__()


def test_memory_is_not_kept() -> None:
    import gc
    import weakref

    with simulated_accelerator():
        tensor = torch.ones(1000, device="cuda") * 2
        watched = weakref.ref(tensor.untyped_storage())
        del tensor
        gc.collect()
        assert watched() is None


def test_everything_is_on_the_cpu_afterwards() -> None:
    with simulated_accelerator():
        tensor = torch.ones(2, device="cuda")
    assert tensor.device.type == "cpu"
    with simulated_accelerator():
        assert tensor.device.type == "cpu"
