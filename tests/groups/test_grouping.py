"""Layer units and groups: any module tree, the published table, random trees, overrides and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_hift.groups.grouping import (
    LayerUnit,
    find_layer_units,
    group_units,
    select_parameters,
    select_units,
)
from tests.architectures import HANDWRITTEN, PRETRAINED_STYLE, TINY, Architecture, Block, NanoGPT, hugging_face, meta

ALL = [*PRETRAINED_STYLE, *HANDWRITTEN]


def assert_exact_partition(model: nn.Module, units: list[LayerUnit]) -> None:
    """By identity: each trainable parameter in exactly one unit, under a name that leads to it, and nothing else."""
    held = [id(p) for unit in units for p in unit.parameters.values()]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for unit in units:
        assert unit.parameters
        for name, p in unit.parameters.items():
            assert model.get_parameter(name) is p


# --- architectures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ALL, ids=lambda a: a.name)
def found(request: pytest.FixtureRequest) -> tuple[Architecture, nn.Module, list[LayerUnit]]:
    model = request.param.build()
    return request.param, model, find_layer_units(model)


Found = tuple[Architecture, nn.Module, list[LayerUnit]]


def test_units_of_architecture(found: Found) -> None:
    architecture, model, units = found
    assert [unit.name for unit in units] == architecture.unit_names
    assert_exact_partition(model, units)


def test_embedding_first_and_norm_with_head_last(found: Found) -> None:
    architecture, _, units = found
    assert units[0].parameters.keys() >= set(architecture.first)
    assert units[-1].parameters.keys() >= set(architecture.last)


def test_tied_weight_counts_once_in_the_first_unit_that_uses_it(found: Found) -> None:
    architecture, model, units = found
    for name in architecture.tied:
        weight = model.get_parameter(name)
        assert [u.name for u in units if any(weight is p for p in u.parameters.values())] == [architecture.tied_to]


def test_block_is_never_split(found: Found) -> None:
    architecture, model, units = found
    by_name = {unit.name: unit for unit in units}
    for path in architecture.block_names:
        inside = {id(p) for name, p in model.named_parameters() if f"{name}.".startswith(f"{path}.")}
        assert inside <= {id(p) for p in by_name[path].parameters.values()}


def test_no_unit_of_bare_norms_but_a_tied_head(found: Found) -> None:
    architecture, model, units = found
    for unit in units[:-1] if architecture.tied else units:
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in unit.parameters]
        assert any(p.ndim > 1 for owner in owners for p in owner.parameters())


@pytest.mark.parametrize("group_size", [1, 2, 3, 100])
def test_groups_of_architecture(found: Found, group_size: int) -> None:
    _, _, units = found
    groups = group_units(units, group_size)
    assert len(groups) == math.ceil(len(units) / group_size)
    assert [u for g in groups for u in g.units] == units


def test_lora_style_training_of_small_matrices_inside_blocks() -> None:
    model = hugging_face("LlamaForCausalLM", "LlamaConfig", **TINY)()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.requires_grad_(True)
    units = find_layer_units(model)
    assert [u.name for u in units] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert_exact_partition(model, units)


def test_only_biases_trainable() -> None:
    model = hugging_face("BertForSequenceClassification", "BertConfig", **TINY)()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    units = find_layer_units(model)
    assert [u.name for u in units][-4:] == [*(f"bert.encoder.layer.{i}" for i in range(3)), "head"]
    assert_exact_partition(model, units)


def test_only_norms_trainable() -> None:
    model = NanoGPT().requires_grad_(False)
    for block in model.transformer.h:
        block.norm.requires_grad_(True)
    assert [u.name for u in find_layer_units(model)] == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]


def test_frozen_parameters_belong_to_no_unit() -> None:
    model = NanoGPT()
    model.transformer.h[1].requires_grad_(False)
    units = find_layer_units(model)
    assert [u.name for u in units] == ["embedding", "transformer.h.0", "transformer.h.2", "head"]
    assert_exact_partition(model, units)


def test_search_restricted_to_given_parameters() -> None:
    model = NanoGPT()
    wanted = list(model.transformer.h[0].parameters())
    (unit,) = find_layer_units(model, parameters=iter(wanted))
    assert list(unit.parameters.values()) == wanted


def test_block_used_twice_is_one_unit() -> None:
    block = Block()
    model = nn.Sequential(nn.Linear(4, 8), block, Block(), block, nn.Linear(8, 2))
    units = find_layer_units(model)
    assert [u.name for u in units] == ["embedding", "1", "2", "head"]
    assert_exact_partition(model, units)


def test_two_stacks_with_a_part_between() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.ModuleList([Block(), Block()])
            self.early = nn.ModuleList([Block(), Block()])
            self.norm, self.bridge = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.early:
                x = block(x)
            x = self.bridge(self.norm(x))
            for block in self.late:
                x = block(x)
            return x

    units = find_layer_units(Mixed())
    assert [u.name for u in units] == ["early.0", "early.1", "norm", "late.0", "late.1"]
    assert set(units[2].parameters) == {"norm.weight", "norm.bias", "bridge.weight", "bridge.bias"}


class ManyWeights(nn.Module):
    """Matrices that are no modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(8, 32)), nn.Parameter(torch.zeros(32, 8))


@pytest.mark.parametrize("layer", [ManyWeights, lambda: nn.LSTM(8, 8), lambda: nn.Bilinear(8, 8, 8)])
@pytest.mark.parametrize("first", [True, False])
def test_a_second_list_whose_layers_are_no_blocks_is_not_one_large_unit(
    layer: Callable[[], nn.Module], first: bool
) -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3))
    lists = {"blocks": blocks, "others": nn.ModuleList(layer() for _ in range(3))}
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), **lists, "head": nn.Linear(8, 5)})
    if first:
        model = nn.ModuleDict({name: model[name] for name in ("embed", "others", "blocks", "head")})
    names = [unit.name for unit in find_layer_units(model)]
    listed = [f"{name}.{i}" for name in (("others", "blocks") if first else ("blocks", "others")) for i in range(3)]
    assert names == ["embedding", *listed, "head"]


def test_a_small_list_beside_blocks_stays_in_one_unit() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)) for _ in range(3))
    model = nn.ModuleDict({"blocks": blocks, "heads": nn.ModuleList(nn.Linear(8, 2) for _ in range(3))})
    assert [unit.name for unit in find_layer_units(model)] == ["blocks.0", "blocks.1", "blocks.2", "head"]


def test_sizes() -> None:
    model = nn.Linear(3, 2).half()
    (unit,) = find_layer_units(model)
    (group,) = group_units([unit])
    assert (unit.numel, unit.nbytes) == (group.numel, group.nbytes) == (8, 16)
    assert group.parameters == unit.parameters == dict(model.named_parameters())


def test_group_is_named_after_its_first_and_last_unit() -> None:
    groups = group_units(find_layer_units(NanoGPT()), 4)
    assert [(g.index, g.name) for g in groups] == [(0, "embedding ... transformer.h.2"), (1, "head")]


# --- the published table ----------------------------------------------------------------------------------------------

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
PUBLISHED = {
    "RoBERTa-base": (
        hugging_face("RobertaForSequenceClassification", "RobertaConfig", **_ROBERTA),
        (124.65, "embedding", 39.00, 68.71),
    ),
    "RoBERTa-large": (
        hugging_face(
            "RobertaForSequenceClassification", "RobertaConfig", **_ROBERTA, hidden_size=1024, num_hidden_layers=24,
            num_attention_heads=16, intermediate_size=4096,
        ),
        (355.36, "embedding", 52.00, 85.37),
    ),
    "GPT-2 large": (
        hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=1280, n_layer=36, n_head=20),
        (774.03, "embedding", 65.64, 91.52),
    ),
    "GPT-Neo 2.7B": (
        hugging_face(
            "GPTNeoForCausalLM", "GPTNeoConfig", hidden_size=2560, num_layers=32, num_heads=20,
            attention_types=[[["global", "local"], 16]],
        ),
        (2651.31, "embedding", 133.90, 94.95),
    ),
    "LLaMA-7B": (
        hugging_face("LlamaForCausalLM", "LlamaConfig"),
        (6738.42, "model.layers.0", 202.38, 97.00),
    ),
    "OPT-13B": (
        hugging_face(
            "OPTForCausalLM", "OPTConfig", hidden_size=5120, ffn_dim=20480, num_hidden_layers=40,
            num_attention_heads=40, word_embed_proj_dim=5120,
        ),
        (12853.47, "model.decoder.layers.0", 314.64, 97.55),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, str, float, float]]:
    """Total and largest group in millions, and the reduction in percent, of each published model."""
    table = {}
    for name, (build, _) in PUBLISHED.items():
        groups = group_units(find_layer_units(build()))
        total, largest = sum(g.numel for g in groups), max(groups, key=lambda g: g.numel)
        table[name] = (total / 1e6, largest.name, largest.numel / 1e6, 100 * (1 - largest.numel / total))
    return table


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_row(name: str, measured: dict[str, tuple[float, str, float, float]]) -> None:
    total, largest, size, reduction = measured[name]
    assert (round(total, 2), largest, round(size, 2), round(reduction, 2)) == PUBLISHED[name][1]


def test_published_mean(measured: dict[str, tuple[float, str, float, float]]) -> None:
    assert round(sum(row[-1] for row in measured.values()) / len(measured), 2) == 89.18


# --- random trees -----------------------------------------------------------------------------------------------------


class Custom(nn.Module):
    """A module with parameters of its own beside its children."""

    def __init__(self, children: list[nn.Module], sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        for i, size in enumerate(sizes):
            self.register_parameter(f"own{i}", nn.Parameter(torch.zeros(size)))
        for i, child in enumerate(children):
            self.add_module(f"child{i}", child)


_LEAVES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(2, 2),
    lambda: nn.Linear(2, 2, bias=False),
    lambda: nn.Embedding(2, 2),
    lambda: nn.Conv1d(2, 2, 1),
    lambda: nn.LayerNorm(2),
    lambda: nn.BatchNorm1d(2, affine=False),
    lambda: nn.LSTM(2, 2),
    lambda: nn.MultiheadAttention(2, 1),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    lambda: nn.ParameterList([nn.Parameter(torch.zeros(2, 2))]),
    nn.ReLU,
    Block,
]


def _containers(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    several = st.lists(children, max_size=4)
    sizes = st.lists(st.sampled_from([(2,), (2, 2), (1, 1, 2), ()]), max_size=2)
    return st.one_of(
        several.map(nn.ModuleList),
        several.map(lambda layers: nn.Sequential(*layers)),
        several.map(lambda layers: nn.ModuleDict({f"part{i}": layer for i, layer in enumerate(layers)})),
        st.builds(Custom, several, sizes),
    )


_TREES = st.recursive(st.sampled_from(_LEAVES).map(lambda build: build()), _containers, max_leaves=12)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A random tree on the meta device with some weights tied, a module used twice, and some parameters frozen."""
    with torch.device("meta"):
        model = draw(_containers(_TREES))
    linears = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding) and "weight" in m._parameters]
    if len(linears) > 1 and draw(st.booleans()):
        linears[-1].weight = linears[0].weight
    if isinstance(model, nn.ModuleList) and len(model) and draw(st.booleans()):
        model.append(model[0])
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 4)) > 0)
    assume(any(p.requires_grad for p in model.parameters()))
    return model


@settings(max_examples=150, deadline=None)
@given(model=models(), data=st.data())
def test_random_tree(model: nn.Module, data: st.DataObject) -> None:
    units = find_layer_units(model)
    assert_exact_partition(model, units)
    assert len({unit.name for unit in units}) == len(units)

    group_size = data.draw(st.integers(1, len(units) + 2), label="group_size")
    groups = group_units(units, group_size)
    assert len(groups) == math.ceil(len(units) / group_size)
    assert all(1 <= len(group.units) <= group_size for group in groups)
    assert [group.index for group in groups] == list(range(len(groups)))
    assert [unit for group in groups for unit in group.units] == units

    again = find_layer_units(model)
    assert [(u.name, u.modules, list(u.parameters)) for u in again] == [
        (u.name, u.modules, list(u.parameters)) for u in units
    ]


@settings(max_examples=50, deadline=None)
@given(model=models())
def test_random_tree_whose_units_are_its_children(model: nn.Module) -> None:
    patterns = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    own = [name for name, _ in model.named_parameters(recurse=False)]
    assert_exact_partition(model, find_layer_units(model, units=[*own, *patterns]))


# --- overrides --------------------------------------------------------------------------------------------------------


def test_each_match_of_a_pattern_is_a_unit() -> None:
    units = find_layer_units(NanoGPT(), units=["transformer.w*", "transformer.h.*", "transformer.ln_f"])
    expected = ["wte", "wpe", "h.0", "h.1", "h.2", "ln_f"]
    assert [u.name for u in units] == [f"transformer.{name}" for name in expected]


def test_nested_list_forms_one_unit() -> None:
    model = NanoGPT()
    units = find_layer_units(
        model, units=[["transformer.wte", "transformer.wpe"], ["transformer.h.[01]"], ["transformer.h.2", "*.ln_f"]]
    )
    assert [u.modules for u in units] == [
        ("transformer.wte", "transformer.wpe"),
        ("transformer.h.0", "transformer.h.1"),
        ("transformer.h.2", "transformer.ln_f"),
    ]
    assert_exact_partition(model, units)


def test_order_of_the_patterns_is_the_order_of_the_units() -> None:
    units = find_layer_units(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), units=["1", "0"])
    assert [u.name for u in units] == ["1", "0"]


def test_pattern_of_a_bare_parameter() -> None:
    units = find_layer_units(nn.Linear(2, 2), units=["weight", "bias"])
    assert [list(u.parameters) for u in units] == [["weight"], ["bias"]]


def test_patterns_need_not_name_what_is_frozen() -> None:
    model = NanoGPT()
    model.transformer.h.requires_grad_(False)
    units = find_layer_units(model, units=["transformer.w*", "transformer.h.*", "transformer.ln_f"])
    assert [u.name for u in units] == ["transformer.wte", "transformer.wpe", "transformer.ln_f"]
    assert_exact_partition(model, units)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["head"], ["head"]),
        (["head", "embedding"], ["embedding", "head"]),
        (["transformer.h.*"], ["transformer.h.0", "transformer.h.1", "transformer.h.2"]),
        (["transformer.ln_f"], ["head"]),
        (["*.wpe"], ["embedding"]),
        ([], []),
    ],
)
def test_select_units(patterns: list[str], chosen: list[str]) -> None:
    assert [u.name for u in select_units(find_layer_units(NanoGPT()), patterns)] == chosen


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["transformer.wpe"], ["transformer.wpe.weight"]),
        (["transformer.h.*.norm"], [f"transformer.h.{i}.norm.{p}" for i in range(3) for p in ("weight", "bias")]),
        (["transformer.h.1.up.bias"], ["transformer.h.1.up.bias"]),
        ([], []),
    ],
)
def test_select_parameters(patterns: list[str], chosen: list[str]) -> None:
    model = NanoGPT()
    selected = select_parameters(model, patterns)
    assert list(selected) == chosen
    assert all(model.get_parameter(name) is p for name, p in selected.items())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["ReLU", "frozen"])
def test_nothing_trainable(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has no trainable parameter.*requires_grad=True"):
        find_layer_units(model)


def test_nothing_trainable_among_the_given_parameters() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        find_layer_units(nn.Linear(2, 2), parameters=nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("group_size", [0, -1, 1.5, True, "equal"])
def test_bad_group_size(group_size: Any) -> None:
    with pytest.raises(ValueError, match=rf"group_size={group_size!r}.*at least 1, or 'balanced'"):
        group_units(find_layer_units(nn.Linear(2, 2)), group_size)


def test_balanced_groups_need_no_more_than_the_largest_unit(found: Found) -> None:
    _, _, units = found
    groups = group_units(units, "balanced")
    assert [unit for group in groups for unit in group.units] == units
    largest = max(unit.numel for unit in units)
    assert max(group.numel for group in groups) == largest
    for group, following in pairwise(groups):
        assert group.numel + following.units[0].numel > largest


def test_balanced_groups_of_a_model_with_a_large_embedding() -> None:
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))  # 20 parameters each
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 4), "blocks": blocks, "head": nn.Linear(4, 2)})
    groups = group_units(find_layer_units(model), "balanced")
    assert [len(group.units) for group in groups] == [1, 3, 3, 2]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["layers.*"], r"'layers\.\*' in units matches no module.*transformer\.wte"),
        (["transformer.drop"], r"'transformer\.drop' in units matches no module with parameters"),
        (
            ["transformer.h.*", "transformer.h.1"],
            r"'transformer\.h\.1' is matched twice.*h\.\*' and 'transformer\.h\.1'",
        ),
        (["transformer", "transformer.wte"], r"'transformer\.wte' is matched twice.*never split"),
        (["transformer.wte", "transformer"], r"'transformer' is matched twice.*by 'transformer\.wte'"),
        ([["transformer.wte", "transformer.w*"]], r"'transformer\.wte' is matched twice"),
        (["transformer.h.*"], r"exactly once: transformer\.wte\.weight, transformer\.wpe\.weight.*Add a pattern"),
        ([], r"exactly once: .* and \d+ more.*Add a pattern"),
    ],
)
def test_bad_units(units: list[str | list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layer_units(NanoGPT(), units=units)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["classifier"], r"'classifier' matches no layer unit; the units are embedding, transformer\.h\.0"),
        (["head", "transformer.ln_f"], r"'head' is matched twice, by 'head' and 'transformer\.ln_f'; drop one"),
    ],
)
def test_bad_units_to_select(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_units(find_layer_units(NanoGPT()), patterns)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["classifier"], r"'classifier' matches no trainable parameter.*transformer\.wte"),
        (["transformer.drop"], r"'transformer\.drop' matches no trainable parameter"),
        (["transformer", "*.wpe"], r"'transformer\.wpe\.weight' is matched twice, by 'transformer' and '\*\.wpe'"),
    ],
)
def test_bad_parameters_to_select(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_parameters(NanoGPT(), patterns)


def test_selecting_what_is_already_frozen() -> None:
    model = meta(NanoGPT)
    model.transformer.wpe.requires_grad_(False)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        select_parameters(model, ["transformer.wpe"])
