"""POET in models of transformers: same logits, export, checkpointing, autocast, compilation; what is kept and why."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from pome.errors import SelectionError, SpecError
from pome.poet import Merger, PoetConfig, parameter_groups, poet_layers, unwrap, wrap

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "gpt2": transformers.GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
IDS = torch.arange(48).view(2, 24) * 7 % 61


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).train()


def stir(model: nn.Module) -> None:
    """Random Q everywhere, of spectral norm about 0.2."""
    generator = torch.Generator().manual_seed(3)
    for layer in poet_layers(model):
        for parameter in (layer.poet_in, layer.poet_out):
            parameter.data.normal_(std=0.03, generator=generator)


def run_loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def one_step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run_loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("sampling", ["block", "full"])
def test_wrapping_merging_and_unwrapping_keep_the_logits(kind, sampling):
    model = make_model(kind)
    before = model(IDS).logits.detach()
    keys = list(model.state_dict())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = wrap(model, PoetConfig(sampling=sampling, block_size=7))
    assert torch.equal(model(IDS).logits, before)
    per_block = {"gpt2": 4, "mixtral": 4}.get(kind, 7)
    assert len(report.wrapped) == 2 * per_block
    assert "lm_head" in report.kept or "llama-tied gpt2".find(kind) >= 0
    assert report.trainable_before == trainable
    assert report.trainable_after == sum(p.numel() for p in model.parameters() if p.requires_grad)
    stir(model)
    turned = model(IDS).logits.detach()
    assert (turned - before).norm() > 1e-3 * before.norm()
    merger = Merger(model, torch.optim.SGD(parameter_groups(model, lr=0.1)))
    merger.merge()
    stir(model)
    merger.merge()
    for layer in poet_layers(model):
        layer.poet_in.data.zero_()
    merged = model(IDS).logits.detach()
    stir(model)
    stirred = model(IDS).logits.detach()
    names = unwrap(model)
    assert len(names) == len(report.wrapped)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    after = model(IDS).logits.detach()
    assert (after - stirred).norm() <= 1e-5 * stirred.norm()
    assert not torch.equal(merged, stirred)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_unwrapped_model_is_a_checkpoint_of_transformers(kind, tmp_path):
    model = make_model(kind)
    wrap(model, PoetConfig(block_size=8))
    stir(model)
    expected = model(IDS).logits.detach()
    unwrap(model)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-6)


# Newer versions of transformers name the method otherwise.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = make_model("llama")
    wrap(model, PoetConfig(block_size=7))
    stir(model)
    expected = one_step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = one_step(model)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_bfloat16_and_autocast_stay_near_float32():
    exact = make_model("qwen2")
    wrap(exact, PoetConfig(block_size=7))
    stir(exact)
    reference = one_step(exact)

    mixed = copy.deepcopy(exact)
    mixed.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed(input_ids=IDS, labels=IDS)
        out.loss.backward()  # Within the region, where careless products would be in 16 bits.
    pure = copy.deepcopy(exact).bfloat16()
    for model, loss in ((mixed, out.loss), (pure, run_loss(pure))):
        if model is pure:
            loss.backward()
        assert loss.item() == pytest.approx(run_loss(exact).item(), rel=0.02)
        for layer in poet_layers(model):
            assert layer.poet_in.dtype == layer.poet_in.grad.dtype == torch.float32
            wanted = reference[f"{layer.poet_name}.poet_in"]
            assert (layer.poet_in.grad - wanted).norm() < 0.15 * wanted.norm()
    assert mixed.model.layers[0].mlp.up_proj(torch.ones(1, 24)).dtype == torch.float32
    layer = mixed.model.layers[0].self_attn.q_proj
    kept = []
    own = {tensor.data_ptr() for tensor in [*layer.parameters(), *layer.buffers()]}
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        assert layer(torch.ones(2, 24, requires_grad=True)).dtype == torch.bfloat16
    activations = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert activations and all(tensor.dtype == torch.bfloat16 for tensor in activations)


# torch's tracer instantiates the autograd function itself, and warns of it.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("sampling", ["block", "full"])
def test_compiled_model_is_not_compiled_again_after_a_merge(sampling):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10))
    wrap(model, PoetConfig(sampling=sampling, block_size=6))
    twin = copy.deepcopy(model)
    compilations = []

    def backend(graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def count(graph, inputs):
            compilations.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=count)(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = []
    for number, (runner, owner) in enumerate([(compiled, model), (twin, twin)]):
        optimizer = torch.optim.AdamW(parameter_groups(owner, lr=0.01))
        merger = Merger(owner, optimizer, every=2)
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            optimizer.zero_grad()
            result = runner(torch.randn(5, 12, generator=generator))
            result.square().mean().backward()
            optimizer.step()
            merger.step()
            if step == 0 and not number:
                first = len(compilations)
        assert merger.merges == 3
        seen.append(result.detach())
    assert first == len(compilations) == 2  # one graph, forward and backward
    torch.testing.assert_close(seen[0], seen[1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = self.free  # One module in two places is one layer.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.free(self.second(self.first(x))))


def test_tied_weights_are_kept_or_refused_by_name():
    model = Tied()
    x = torch.randn(3, 6)
    report = wrap(model, PoetConfig(block_size=4))
    assert [layer.name for layer in report.wrapped] == ["free"]
    assert report.kept["first"] == "its weight is tied to second.weight"
    stir(model)
    expected = model(x).detach()
    unwrap(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(SpecError, match=r"include matches first, whose weight is tied to second\.weight"):
        wrap(Tied(), PoetConfig(include="first|free"))


def test_heads_are_kept_until_exclude_says_otherwise():
    model = make_model("llama")
    report = wrap(model, PoetConfig(include=r"mlp\.", exclude=r"layers\.1"))
    assert [layer.name for layer in report.wrapped] == [
        f"model.layers.0.mlp.{role}_proj" for role in ("gate", "up", "down")
    ]
    assert report.kept["model.layers.1.mlp.up_proj"] == "excluded"
    assert report.kept["model.layers.0.self_attn.q_proj"] == "include does not match it"
    unwrap(model)
    report = wrap(model, PoetConfig(exclude=()))
    assert report.wrapped[-1].name == "lm_head"
    assert report.kept["model.embed_tokens"] == "Embedding is not a plain linear layer"


def test_layers_whose_weight_is_read_past_their_forward_are_kept():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"encoder": encoder, "plain": nn.Linear(8, 8), "hooked": nn.Linear(8, 8)})
    model["hooked"].forward = lambda x: x
    report = wrap(model, PoetConfig(block_size=4))
    assert [layer.name for layer in report.wrapped] == ["plain"]
    assert report.kept["encoder.linear1"] == "TransformerEncoderLayer reads the weight past the layer's forward"
    assert "encoder.self_attn.out_proj" in report.kept and "encoder.self_attn.in_proj_weight" in report.kept
    assert "replaced on the instance" in report.kept["hooked"]
    assert "1 layers in POET training" in str(report)


def test_nothing_to_wrap_and_wrapping_twice_are_errors():
    with pytest.raises(SelectionError, match="no linear layer to wrap"):
        wrap(make_model("llama"), PoetConfig(include="nowhere"))
    with pytest.raises(SelectionError, match="the model has no linear layer"):
        wrap(nn.LayerNorm(3))
    model = make_model("llama")
    wrap(model)
    with pytest.raises(SpecError, match="unwrap first"):
        wrap(model)
    with pytest.raises(SelectionError, match="on the meta device"), torch.device("meta"):
        wrap(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": 1.5},
        {"block_size": 0.0},
        {"block_size": True},
        {"block_size": "half"},
        {"neumann_terms": -1},
        {"neumann_terms": "all"},
        {"neumann_terms": 2.0},
        {"sampling": "blocks"},
        {"init": "ones"},
        {"init": 3},
        {"rounding": "up"},
        {"include": "("},
        {"exclude": ""},
        {"exclude": [3]},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        PoetConfig(**options)


def test_inits_have_the_spectra_they_say():
    def spectrum(init, fan_in=40, fan_out=30):
        model = nn.Sequential(nn.Linear(fan_in, fan_out))
        wrap(model, PoetConfig(init=init))
        return model[0].weight.detach(), torch.linalg.svdvals(model[0].weight)

    weight, _ = spectrum("normalized")
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(30))
    weight, _ = spectrum("standard", 400, 300)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    weight, _ = spectrum("xavier", 400, 300)
    assert weight.abs().max().item() == pytest.approx((6 / 700) ** 0.5, rel=0.001)
    assert weight.std().item() == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    torch.testing.assert_close(spectrum("uniform")[1], torch.ones(30), rtol=1e-5, atol=0)
    _, values = spectrum("power-law")
    torch.testing.assert_close(values / values[0], torch.arange(1, 31) ** -0.5, rtol=1e-5, atol=0)
    assert values.square().mean().item() == pytest.approx(1, rel=1e-5)
    _, values = spectrum(lambda count: torch.linspace(2, 0, count))
    torch.testing.assert_close(values, torch.linspace(2, 0, 30), rtol=1e-5, atol=1e-6)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(SpecError, match="init for 1 gave"):
        wrap(model, PoetConfig(init=lambda count: [1.0] * 4))
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    conv = make_model("gpt2")
    wrap(conv, PoetConfig(init="normalized"))
    torch.testing.assert_close(conv.transformer.h[0].mlp.c_fc.weight.norm(dim=0), torch.ones(96))


def test_a_real_pretrained_model_keeps_its_logits(smollm2):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.arange(1, 17)[None] * 37
    with torch.no_grad():
        before = model(ids).logits
        report = wrap(model, PoetConfig(block_size=64))
        assert len(report.wrapped) == 210 and list(report.kept) == ["model.embed_tokens", "lm_head"]
        assert torch.equal(model(ids).logits, before)
        generator = torch.Generator().manual_seed(0)
        for layer in poet_layers(model):
            layer.poet_in.normal_(std=0.003, generator=generator)
            layer.poet_out.normal_(std=0.003, generator=generator)
        turned = model(ids).logits
        assert (turned - before).norm() > 0.01 * before.norm()
        unwrap(model)
        assert (model(ids).logits - turned).norm() <= 1e-5 * turned.norm()
