"""What the weights of a transformers model really do, found by running its modules, never by reading their names.

A feed-forward module is run alone on the inputs that it got inside its model. One of its matrices is `down` when
each of its rows moves one output coordinate alone, and reads the input when a zero input coordinate switches one of
its columns off; of the latter, rows in which the output is affine are `up` rows, the rest `gate` rows (or `up` rows
when nothing is affine: then there is no gate). Scaling single rows and columns shows the orientation, and which rows
of a fused tensor are which.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

# Modules that mix positions: what they hold is never a feed-forward matrix. A layer or a model is none of them,
# whatever its family is called.
MIXES = re.compile(
    r"(?!.*(Layer|Block|Model|LM|MLP|FeedForward|Experts|Stack|Generation|Head)$)"
    r".*(Atten|Attn|MLA$|Mamba|Indexer|DeltaNet|Conv(?!1D)|mLSTM)"
)
# Small maps out of the stream and back that are no feed-forward module of a layer.
BESIDES = re.compile(r"Adapter|Norm$")
ROUTES = re.compile(r"Router|Gate$|TopK|Classifier$")
FFN = ("gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
SEVERAL = 1 << 40  # tags of one tensor lie below those of the next


@dataclass(frozen=True)
class Truth:
    """The roles of one parameter, row of the matrix by row; `out` and `inn` are its axes, counted from the end."""

    roles: tuple[str, ...]
    out: int
    inn: int


def find_ffn_truth(model: nn.Module, inputs: dict[str, Any] | None) -> dict[str, Truth]:
    """Parameter name -> truth for every feed-forward matrix that can be proved."""
    captured = capture_calls(model, inputs) if inputs is not None else {}
    modules = dict(model.named_modules())
    truths: dict[str, Truth] = {}
    for name in sorted(modules, key=lambda name: -name.count(".")):
        module = modules[name]
        matrices = matrices_of(module)
        if len(matrices) < 2 or not name or mixes(modules, name) or ROUTES.search(type(module).__name__):
            continue
        if BESIDES.search(type(module).__name__) or any(
            BESIDES.search(type(modules[p]).__name__) for p in parents(name)
        ):
            continue
        if any(name == known.rpartition(".")[0] or known.startswith(name + ".") for known in truths):
            continue
        inside = list(module.modules())
        if len(matrices) > 6 or any(isinstance(m, nn.Embedding) or MIXES.match(type(m).__name__) for m in inside):
            continue
        key = (code_of(module), *((n, tuple(p.shape)) for n, p in matrices.items()))
        if not _PROVED.get(key):
            _PROVED[key] = probe(module, matrices, captured.get(name))
        truths |= {f"{name}.{n}": truth for n, truth in _PROVED[key].items()}
    return truths | pair_by_shape(modules, truths)


# Most architectures repeat the feed-forward code of another: the same code on the same shapes is run once.
_PROVED: dict[tuple, dict[str, Truth]] = {}


def code_of(module: nn.Module) -> tuple[str, ...]:
    """The code that runs when a module does: of itself and of all that it holds, kinds of activation included."""
    return tuple(
        inspect.getsource(inspect.unwrap(type(inner).forward)) + ("" if inner._modules else type(inner).__name__)
        for inner in module.modules()
    )


def matrices_of(module: nn.Module) -> dict[str, Tensor]:
    """The matrices and stacks of matrices of a module, without the stacked biases of the latter."""
    matrices = {n: p for n, p in module.named_parameters() if p.ndim in (2, 3)}
    stacks = {p.shape[0] for p in matrices.values() if p.ndim == 3}
    return {n: p for n, p in matrices.items() if p.ndim == 3 or p.shape[0] not in stacks}


def mixes(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module lies in an attention, state-space or convolution module."""
    return any(is_mixer(modules[parent]) for parent in [*parents(name), name])


def parents(name: str) -> list[str]:
    """The modules around a module, outermost first."""
    return list(itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}"))[:-1]


def capture_calls(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[tuple, dict]]:
    """The arguments with which each module of the model is called; empty when the model does not run."""
    calls: dict[str, tuple[tuple, dict]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    hooks = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(**inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError):
        pass  # what ran before the failure was captured
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def synthesize_calls(module: nn.Module, widths: set[int], experts: set[int]) -> Iterator[tuple[tuple, dict]]:
    """Calls that a feed-forward module or a bank of experts may understand."""
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    for width in sorted(widths):
        if len(names) == 1:
            yield (torch.randn(1, 6, width, dtype=torch.float64),), {}
            yield (torch.randn(12, width, dtype=torch.float64),), {}
        for count in experts if len(names) == 3 else ():
            index = torch.arange(count).expand(12, count)
            weights = torch.rand(12, count, dtype=torch.float64)
            yield (torch.randn(12, width, dtype=torch.float64), index, weights), {}


def probe(module: nn.Module, matrices: dict[str, Tensor], call: tuple[tuple, dict] | None) -> dict[str, Truth]:
    """Truth for the matrices of one module; empty when it is no feed-forward module that can be run."""
    torch.manual_seed(1)
    values = {n: torch.randn_like(p) * 0.1 for n, p in module.named_parameters()}
    values |= {n: torch.rand_like(p) + 0.5 for n, p in module.named_parameters() if p.ndim == 1}
    widths = {size for p in matrices.values() for size in p.shape[-2:]}
    experts = {p.shape[0] for p in matrices.values() if p.ndim == 3}
    calls = ([call] if call is not None else []) + list(synthesize_calls(module, widths, experts))
    for args, kwargs in calls:
        found = find_stream(args, kwargs)
        if found is None:
            continue
        try:
            run = Runner(module, values, args, kwargs, found)
            x, y = run.x, run({}, None)
            elsewhere = run({}, change_one_position(x))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError):
            continue
        if y.shape[-1] != x.shape[-1] or not torch.isfinite(y).all():
            continue
        if int(moves(elsewhere, y).any(-1).sum()) != 1:
            continue  # it mixes positions
        truths = name_rows(matrices, values, run, y)
        if any("down" in truth.roles for truth in truths.values()):
            return truths
    return {}


def find_stream(args: tuple, kwargs: dict) -> int | str | None:
    """Which argument is the stream of hidden states: the first floating point tensor."""
    for key, value in itertools.chain(enumerate(args), kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return key
    return None


class Runner:
    """The module as a function of some changed parameters and of its input."""

    def __init__(self, module: nn.Module, values: dict, args: tuple, kwargs: dict, stream: int | str) -> None:
        given = args[stream] if isinstance(stream, int) else kwargs[stream]
        self.parameters = dict(module.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.data = values[name]
        self.module, self.values, self.args, self.kwargs, self.stream = module, values, args, kwargs, stream
        self.x = torch.randn(given.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def __call__(self, changed: dict[str, Tensor], x: Tensor | None) -> Tensor:
        x = self.x if x is None else x
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.stream, int):
            args[self.stream] = x.clone()
        else:
            kwargs[self.stream] = x.clone()
        for name, value in changed.items():
            self.parameters[name].data = value
        try:
            with torch.no_grad():
                out = self.module(*args, **kwargs)
        finally:
            for name in changed:
                self.parameters[name].data = self.values[name]
        return (out[0] if isinstance(out, tuple) else out).double().reshape(-1, x.shape[-1])


def name_rows(matrices: dict, values: dict, run: Runner, y: Tensor) -> dict[str, Truth]:
    """Truth of each matrix, from what scaling its rows and columns does to the output `y`."""
    width, truths, inputs = y.shape[-1], {}, {}
    for name, parameter in matrices.items():
        for axis in (-2, -1):
            if parameter.shape[axis] != width:
                continue
            moved = (
                moves(run({name: scale_one(values[name], axis, 0, 1.7)}, None), y).any(0).nonzero().flatten().tolist()
            )
            if moved == [0] and moves_one_only(run, values, name, axis, y):
                truths[name] = Truth(("down",) * width, axis, -3 - axis)
            elif moved and reads_input(run, values, name, axis):
                inputs.setdefault(name, -3 - axis)
    insides = {parameter.shape[truths[n].inn] for n, parameter in matrices.items() if n in truths}
    rows_in_all = sum(matrices[name].shape[out] for name, out in inputs.items() if name not in truths)
    if len(insides) != 1 or rows_in_all not in (max(insides), 2 * max(insides)):
        return {}  # not the shape of a feed-forward module
    affine = {
        name: (find_affine_rows(run, values, name, out, y), out) for name, out in inputs.items() if name not in truths
    }
    kinds = [kind for rows, _ in affine.values() for kind in rows]
    bends = sorted(set(kinds) - {DEAD})
    if len(insides) == 1 and len(bends) == 1 and len(kinds) == max(insides):
        names = {bends[0]: "up"}
    elif len(insides) == 1 and len(bends) == 2 and len(kinds) == 2 * max(insides):
        names = dict(zip(bends, ("up", "gate"), strict=True))
        if not all(kinds.count(bend) + kinds.count(DEAD) >= max(insides) >= kinds.count(bend) for bend in bends):
            return {}
    else:
        return {}
    for name, (rows, out) in affine.items():
        truths[name] = Truth(tuple(names.get(kind, "dead") for kind in rows), out, -3 - out)
    return truths


def reads_input(run: Runner, values: dict, name: str, axis: int) -> bool:
    """Whether `axis` of a matrix lies along the module's input: a linear layer says so, else a zero there shows it."""
    owner = run.module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.Linear, Conv1D)):
        return axis == (-2 if isinstance(owner, Conv1D) else -1)
    blind = run.x.clone()
    blind[..., 0] = 0
    return not moves(run({name: scale_one(values[name], axis, 0, 1.7)}, blind), run({}, blind)).any()


def change_one_position(x: Tensor) -> Tensor:
    x = x.clone()
    first = x.reshape(-1, x.shape[-1])[0]
    first += torch.linspace(0, 1, len(first)) ** 2
    return x


def moves(a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    """Where two outputs differ by more than rounding, which some modules do in float32."""
    return (a - b).abs() > 1e-5 * float((b if scale is None else scale).abs().max())


def moves_one_only(run: Runner, values: dict, name: str, axis: int, y: Tensor) -> bool:
    last = values[name].shape[axis] - 1
    moved = moves(run({name: scale_one(values[name], axis, last, 1.7)}, None), y).any(0)
    return moved.nonzero().flatten().tolist() == [last]


def scale_one(value: Tensor, axis: int, index: int, factor: float) -> Tensor:
    value = value.clone()
    value.select(axis, index).mul_(factor)
    return value


AFFINE, ODD, BENT, DEAD = range(4)


def find_affine_rows(run: Runner, values: dict, name: str, out: int, y: Tensor) -> list[int]:
    """For each row of a matrix how far the output is from an affine function of it.

    A row of an up projection enters as a factor, so that turning its sign turns its contribution; where the factor
    is capped, or a norm follows, it is still odd, but no longer affine. An activation is neither.
    """
    rows = []
    for row in range(values[name].shape[out]):
        zero, minus = (run({name: scale_one(values[name], out, row, f)}, None) for f in (0.0, -1.0))
        if not moves(zero, y).any():
            rows.append(DEAD)
            continue
        even = y + minus
        along = (even * zero).sum(-1, keepdim=True) / (zero * zero).sum(-1, keepdim=True) * zero
        if moves(even, along, y).any():
            rows.append(BENT)
            continue
        double = run({name: scale_one(values[name], out, row, 2.0)}, None)
        straight = not moves(double - y, y - zero, y).any() and not moves(even, 2 * zero, y).any()
        rows.append(AFFINE if straight else ODD)
    return rows


def pair_by_shape(modules: dict[str, nn.Module], truths: dict[str, Truth]) -> dict[str, Truth]:
    """Up and down of a layer in which no feed-forward module of its own runs: one map out of the stream, one back."""
    layers: dict[str, list[tuple[str, int, int, bool]]] = {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)) and not mixes(modules, name):
            inside = [p for p in parents(name) if p.rpartition(".")[2].isdigit()]
            odd = any(BESIDES.search(type(modules[p]).__name__) for p in parents(name))
            if inside and not odd and not ROUTES.search(type(modules[parents(name)[-1]]).__name__):
                rows, columns = module.weight.shape
                flipped = isinstance(module, Conv1D)
                out, inn = (columns, rows) if flipped else (rows, columns)
                layers.setdefault(inside[-1], []).append((name + ".weight", out, inn, flipped))
    found = {}
    for layer, linears in layers.items():
        if any(name.startswith(layer + ".") for name in truths):
            continue  # its feed-forward module has been found
        width = stream_width(modules[layer])
        ups = [one for one in linears if one[2] == width != one[1]]
        downs = [one for one in linears if one[1] == width != one[2]]
        if len(ups) == len(downs) == 1 and ups[0][1] == downs[0][2]:
            for role, (name, out, _, flipped) in (("up", ups[0]), ("down", downs[0])):
                found[name] = Truth((role,) * out, -1 if flipped else -2, -2 if flipped else -1)
    return found


def stream_width(layer: nn.Module) -> int:
    """Width of the stream of a layer, by its norms."""
    widths = [p.shape[0] for n, p in layer.named_parameters() if p.ndim == 1 and re.search("norm|ln", n, re.IGNORECASE)]
    return max(set(widths), key=widths.count) if widths else 0


def tag(model: nn.Module) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The state dict with every entry replaced by a number that tells which entry it is."""
    names, tagged = {}, {}
    for index, (name, value) in enumerate(model.state_dict().items()):
        names[index] = name
        tagged[name] = (torch.arange(value.numel()) + index * SEVERAL).reshape(value.shape)
    return tagged, names


def saved_tags(model: Any, tagged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, as `save_pretrained` spells and arranges it on disk."""
    return revert_weight_conversion(model, dict(tagged))


# Attention: what becomes query, key and value is seen by standing in for the attention function itself.

_SEEN: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []


def watch_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple:
    """An attention function that keeps what it is given; (batch, heads, positions, head size) each."""
    _SEEN.append((module, query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register("watch", watch_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("watch", eager_mask)


def is_mixer(module: nn.Module) -> bool:
    return MIXES.match(type(module).__name__) is not None


def detach_all(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def cut_off(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut_off, args)), {key: cut_off(value) for key, value in kwargs.items()}


def find_attention_truth(model: Any, inputs: dict[str, Any]) -> dict[str, Truth]:
    """Parameter name -> truth for the matrices of attention modules that go through the common attention function."""
    _SEEN.clear()
    names = {id(module): name for name, module in model.named_modules()}
    all_grads: dict[str, tuple[int, list[Tensor]]] = {}
    # A module that runs several times, as in a model that shares its layers, must not see itself in its input.
    hooks = [m.register_forward_pre_hook(detach_all, with_kwargs=True) for m in model.modules() if is_mixer(m)]
    try:
        model.set_attn_implementation("watch")
        model(**inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError):
        pass  # what ran before the failure was seen
    finally:
        for hook in hooks:
            hook.remove()
    for module, query, key, value in _SEEN:
        matrices = {n: p for n, p in module.named_parameters() if p.ndim == 2 and p.requires_grad}
        reached: dict[str, list[Tensor]] = {n: [] for n in matrices}
        for tensor in (query, key, value):
            weights = torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(3))
            if not tensor.requires_grad or not matrices:
                break
            grads = torch.autograd.grad(
                (tensor * weights).sum(), list(matrices.values()), retain_graph=True, allow_unused=True
            )
            for (n, parameter), grad in zip(matrices.items(), grads, strict=True):
                reached[n].append(torch.zeros_like(parameter) if grad is None else grad)
        for n, grads in reached.items():
            if len(grads) == 3:
                owner = module.get_submodule(n.rpartition(".")[0])
                out = -1 if isinstance(owner, Conv1D) else -2
                known = all_grads.get(f"{names[id(module)]}.{n}", (out, [torch.zeros(())] * 3))[1]
                both = [a.abs() + b.abs() for a, b in zip(known, grads, strict=True)]
                all_grads[f"{names[id(module)]}.{n}"] = out, both
    _SEEN.clear()
    return {n: Truth(name_attention_rows(grads, out), out, -3 - out) for n, (out, grads) in all_grads.items()}


def name_attention_rows(grads: list[Tensor], out: int) -> tuple[str, ...]:
    """For each row what it becomes: query, key, value, several of them, or nothing (then it comes after them)."""
    touched = torch.stack([(grad != 0).any(-3 - out) for grad in grads]).T.tolist()
    names = {(True, False, False): "q", (False, True, False): "k", (False, False, True): "v"}
    return tuple(names.get(tuple(row), "several" if any(row) else "after") for row in touched)
