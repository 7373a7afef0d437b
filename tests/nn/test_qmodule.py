"""What every quantized module promises: states, names on disk, moving, ties, compiling."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import defaults, freeze, rtn, schemes
from zeropoint.errors import StateError
from zeropoint.nn import MODULES, QEmbedding, QLinear
from zeropoint.qtensor import QTensor, part_specs
from zeropoint.scheme import Scheme

from .cases import K, N, example_input, float_module, live_module

KINDS = list(MODULES.values())
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)
every_default = pytest.mark.parametrize("scheme", defaults(), ids=str)
INT4 = Scheme.of("int4")


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


# --- live and frozen ------------------------------------------------------------------------------


@pytest.mark.usefixtures("torch_kernel")
@every_kind
@every_scheme
def test_freezing_changes_no_output(kind, scheme):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module = live_module(kind, scheme, dtype)
        x = example_input(kind, dtype)
        before = module(x)
        freeze(module)
        assert before.dtype == dtype
        assert torch.equal(module(x), before)


@every_kind
def test_the_weight_is_a_parameter_while_live_and_a_qtensor_once_frozen(kind):
    float_weight = float_module(kind).weight
    module = live_module(kind, INT4)
    assert isinstance(module.weight, nn.Parameter) and module.weight.shape == float_weight.shape
    assert not module.frozen and module.kernel is None
    qweight = rtn(module.float_weight(), INT4)
    module.freeze(qweight)
    assert module.frozen and module.kernel is not None
    assert isinstance(module.weight, QTensor)
    for suffix, part in qweight.parts.items():
        assert module.weight.parts[suffix] is part
    assert (module.weight.shape, module.weight.dtype) == ((N, K), torch.float32)
    assert "weight" not in dict(module.named_parameters())


@every_kind
def test_a_live_module_uses_the_float_modules_parameters_and_mode(kind):
    module = float_module(kind).eval()
    live = kind.from_float(module, INT4)
    assert live.weight is module.weight and not live.training
    assert dict(live.named_parameters()).keys() == dict(module.named_parameters()).keys()


@every_kind
def test_freezing_twice_is_refused(kind):
    module = freeze(live_module(kind, INT4))
    with pytest.raises(StateError, match="the module is frozen already"):
        module.freeze(module.qweight)
    with pytest.raises(StateError, match="the module is frozen already"):
        module.freeze_tied(freeze(live_module(kind, INT4)))


# --- names and values in a state dict -------------------------------------------------------------


@every_kind
@every_default
def test_the_state_dict_holds_the_parts_under_the_weights_name(kind, scheme):
    module = freeze(live_module(kind, scheme))
    state = module.state_dict()
    assert ("bias" in state) == (kind is not QEmbedding)
    state.pop("bias", None)
    expected = {f"weight{suffix}": spec for suffix, spec in part_specs((N, K), scheme).items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == expected


@every_kind
def test_a_live_state_dict_is_the_float_modules(kind):
    module = float_module(kind)
    state = kind.from_float(module, INT4).state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in module.state_dict().items())


@every_kind
@every_default
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_another_frozen_module(kind, scheme, assign):
    source = freeze(live_module(kind, scheme, seed=1))
    target = freeze(live_module(kind, scheme, seed=2))
    x = example_input(kind)
    assert not torch.equal(source(x), target(x))
    state = {name: t.clone() for name, t in source.state_dict().items()}
    result = target.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(source(x), target(x))


@every_kind
@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "float8_e4m3fn"])
def test_a_float_checkpoint_does_not_load_into_a_frozen_module(kind, name):
    module = freeze(live_module(kind, Scheme.of(name, group_size=-1)))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(float_module(kind).state_dict(), strict=False)


# --- moving ---------------------------------------------------------------------------------------


@every_kind
@every_scheme
def test_changing_dtype_keeps_every_bit_of_the_parts(kind, scheme):
    module = freeze(live_module(kind, scheme))
    before = {name: (t.dtype, bits(t).clone()) for name, t in module.weight.parts.items()}
    assert module.to(torch.bfloat16) is module
    for name, part in module.weight.parts.items():
        assert part.dtype == before[name][0] and torch.equal(bits(part), before[name][1])
    assert module.weight.dtype == torch.bfloat16 == module.weight.dequantize().dtype
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    assert module(example_input(kind, torch.bfloat16)).dtype == torch.bfloat16


@every_kind
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: nn.Sequential(m).to(torch.bfloat16)[0], torch.bfloat16),
    ],
    ids=["half", "double", "inside a model"],
)
def test_every_way_to_cast_works_live_and_frozen(kind, cast, dtype):
    live = cast(live_module(kind, INT4))
    assert live.weight.dtype == dtype
    frozen = cast(freeze(live_module(kind, INT4)))
    x = example_input(kind, dtype)
    assert live(x).dtype == frozen(x).dtype == frozen.weight.dtype == dtype
    assert frozen.weight.scale.dtype == torch.float16
    if dtype == torch.float64:  # the only cast that leaves the float weight as it was
        assert torch.equal(live(x), frozen(x))


@every_kind
@every_default
def test_moving_to_another_device_moves_every_part(kind, scheme):
    module = freeze(live_module(kind, scheme)).to("meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module.weight.device.type == "meta"
    indices_or_x = example_input(kind).to("meta")
    assert module(indices_or_x).shape == (2, 3, K if kind is QEmbedding else N)


# --- ties -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head with one weight, the shape of a language model."""

    def __init__(self, scheme=INT4, frozen=True):
        super().__init__()
        embedding = float_module(QEmbedding)
        head = nn.Linear(K, N, bias=False)
        head.weight = embedding.weight
        self.embed = QEmbedding.from_float(embedding, scheme)
        self.head = QLinear.from_float(head, scheme)
        if frozen:
            freeze(self.embed)
            self.head.freeze_tied(self.embed)

    def forward(self, indices):
        return self.head(self.embed(indices))


@pytest.mark.usefixtures("torch_kernel")
@every_default
def test_a_tied_weight_is_stored_once_and_changes_no_output(scheme):
    live, frozen = Tied(scheme, frozen=False), Tied(scheme)
    indices = example_input(QEmbedding)
    assert torch.equal(live(indices), frozen(indices))
    assert live.head.tied_to is None and frozen.head.tied_to is frozen.embed
    owned = frozen.embed.weight.parts
    assert all(part is owned[suffix] for suffix, part in frozen.head.weight.parts.items())
    assert {name.split(".")[0] for name in frozen.state_dict()} == {"embed"}
    assert not list(frozen.head.parameters()) and not list(frozen.head.buffers())
    assert not list(frozen.head.children()), "the owner is not a child"
    assert repr(frozen.head).endswith(f"frozen, kernel={frozen.head.kernel}, tied)")


def test_a_copy_is_tied_to_its_own_embedding():
    model = Tied()
    copied = copy.deepcopy(model)
    assert copied.head.tied_to is copied.embed is not model.embed
    indices = example_input(QEmbedding)
    expected = model(indices)
    copied.embed.weight.packed.zero_()
    assert torch.equal(model(indices), expected)
    assert not torch.equal(copied(indices), expected)


def test_loading_a_state_dict_reaches_the_tied_module():
    source, target = Tied(), Tied()
    target.embed.weight.packed.zero_()
    target.load_state_dict(source.state_dict())
    indices = example_input(QEmbedding)
    assert torch.equal(source(indices), target(indices))


def test_casting_a_tied_model_casts_both_ends():
    model = Tied().to(torch.bfloat16)
    assert model.head.weight.dtype == model.embed.weight.dtype == torch.bfloat16
    assert model(example_input(QEmbedding)).dtype == torch.bfloat16
    assert model.head.tied_to is model.embed


def test_a_tied_head_becomes_a_float_module_of_its_own():
    model = Tied()
    head = model.head.to_float()
    assert torch.equal(head.weight, model.embed.weight.dequantize())


# --- compiling ------------------------------------------------------------------------------------


# torch's own, when inductor is imported.
torchs_warning = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torchs_warning
@every_kind
@pytest.mark.parametrize("state", ["live", "frozen"])
def test_it_compiles_as_one_graph(kind, state, fresh_dynamo):
    module = live_module(kind, INT4)
    if state == "frozen":
        freeze(module)
    x = example_input(kind)
    expected = module(x)
    found = torch.compile(module, fullgraph=True)(x)
    bound = 4 * K * torch.finfo(torch.float32).eps * expected.detach().abs().max()
    assert (found - expected).abs().max() <= bound


@torchs_warning
def test_a_compiled_live_module_passes_gradients(fresh_dynamo):
    module = live_module(QLinear, INT4)
    x = example_input(QLinear)
    module(x).square().sum().backward()
    expected = module.weight.grad.clone()
    module.weight.grad = None
    torch.compile(module, fullgraph=True)(x).square().sum().backward()
    bound = 4 * K * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (module.weight.grad - expected).abs().max() <= bound


@torchs_warning
def test_a_compiled_tied_model_is_one_graph(fresh_dynamo):
    model = Tied()
    indices = example_input(QEmbedding)
    expected = model(indices)
    found = torch.compile(model, fullgraph=True)(indices)
    assert (found - expected).abs().max() <= 4 * K * torch.finfo(
        torch.float32
    ).eps * expected.abs().max()


@every_kind
def test_a_frozen_module_exports_with_its_operator_and_its_parts(kind):
    module = freeze(live_module(kind, INT4))
    x = example_input(kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("zeropoint.") for name in operators)
    assert set(program.state_dict) == set(module.state_dict())
    longer = torch.cat([x, x, x])
    assert torch.equal(program.module()(longer), module(longer))


@every_kind
def test_functional_call_swaps_the_parts(kind):
    module, other = freeze(live_module(kind, INT4)), freeze(live_module(kind, INT4, seed=3))
    x = example_input(kind)
    found = torch.func.functional_call(module, dict(other.state_dict()), (x,))
    assert torch.equal(found, other(x)) and not torch.equal(module(x), other(x))
