"""Sharded over several processes, against one process on the joined batch."""

import os
import signal
import time
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_hift import HiFTCallback, HiFTFSDPStrategy, HiFTModule, HiFTStrategy, LayerUpdates, StreamingCheckpointIO
from lightning_hift.activations.chunked_loss import chunked_loss
from lightning_hift.cli import main
from lightning_hift.distributed import sharded_checkpoint
from lightning_hift.distributed.sharded_checkpoint import consolidate
from tests.distributed.test_ddp import ROWS, assert_close, loader, rows, sgd
from tests.engine.test_missed_turns import Dropping
from tests.models import (
    VOCABULARY,
    WIDTH,
    Automatic,
    Manual,
    ResumableLoader,
    Rows,
    as_published,
    language_model,
    next_token_loss,
    tokens,
    trainer,
)
from tests.processes import Processes, succeeded
from tests.tasks.test_generation import LETTERS, WIDE, data_of, module_of, rows_of
from tests.tiny_texts import SMALL, word_tokenizer


def whole(module):
    """All parameters, gathered from all processes."""
    return {
        name.removeprefix("net."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def fit(strategy, world, module=Automatic, steps=11, make_optimizer=sgd, callback=None, count=None, **options):
    model = module(make_optimizer)
    run = trainer(
        strategy=strategy,
        devices=world,
        callbacks=[as_published(**(callback or {}))],
        use_distributed_sampler=False,
        **options,
    )
    dataset = rows(steps, 2) if count is None else torch.utils.data.Subset(rows(steps, 2), range(count))
    run.fit(model, loader(dataset, world, run.global_rank))
    return whole(model)


class WithLayerDropout(Automatic):
    """Each block is left out of half of the batches, in all processes alike."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net = Dropping()


CASES = {
    "automatic": {},
    "layer_dropout": {"module": WithLayerDropout},
    "manual": {"module": Manual},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 3},
    "random_order": {"callback": {"order": "random", "reshuffle": True}},
    "head_always_active": {"callback": {"always_active": ["net.head"]}},
    "ragged_last_batch": {"count": 2 * (10 * ROWS + 2)},
}


def run_case(name):
    return fit(HiFTFSDPStrategy(), 2, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_the_joined_batch(name, two):
    first, second = succeeded(two.run(run_case, name))
    assert_close(first, fit(HiFTStrategy(), 1, **CASES[name]))
    assert all(torch.equal(first[key], second[key]) for key in first)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


# --- what is where ----------------------------------------------------------------------------------------------------


class Held(pl.Callback):
    """What this process holds after each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, run, module, *args):
        (engine,) = run.callbacks[0].engines
        own = {name: p.to_local().shape for name, p in module.named_parameters()}
        self.steps.append((own, engine.offloader.host_bytes, engine.offloader.device_bytes))


def run_held(strategy, world, **options):
    model, held = Automatic(adamw), Held()
    run = trainer(strategy=strategy, devices=world, callbacks=[as_published(), held], use_distributed_sampler=False)
    run.fit(model, loader(rows(6, 2), world, run.global_rank))
    blocks = [type(block).__name__ for block in model.net.blocks]
    return held.steps, blocks, {name: p.shape for name, p in model.named_parameters()}


def run_held_in_two():
    return run_held(HiFTFSDPStrategy(), 2)


def test_each_process_holds_its_part_of_weights_and_state(two):
    results = succeeded(two.run(run_held_in_two))
    for steps, blocks, shapes in results:
        assert all(name.startswith("FSDP") for name in blocks)
        for own, *_ in steps:
            for name, shape in shapes.items():
                assert own[name][0] in (shape[0] // 2, -(-shape[0] // 2))
        numel = sum(shape.numel() for shape in steps[-1][0].values())
        counters = 4 * len(shapes)
        assert steps[-1][1] == 8 * numel + counters  # AdamW: two moments of 4 bytes
        largest = max(device for *_, device in steps)
        assert 0 < largest < steps[-1][1] / 2


def run_with_evaluation(reshard_after_forward, world=2):
    model = Automatic(sgd)
    run = trainer(
        strategy=HiFTFSDPStrategy(reshard_after_forward=reshard_after_forward),
        devices=world,
        callbacks=[as_published()],
        use_distributed_sampler=False,
        val_check_interval=1,
        num_sanity_val_steps=1,
    )
    batches, held_out = ([b[run.global_rank :: world] for b in tokens(count, ROWS * 2)] for count in (11, 1))
    run.fit(model, DataLoader(batches, batch_size=None), DataLoader(held_out, batch_size=None))
    return whole(model), run.callback_metrics["val_loss"].item()


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_evaluation_between_steps_changes_nothing(reshard_after_forward, two):
    (first, _), _ = succeeded(two.run(run_with_evaluation, reshard_after_forward))
    assert_close(first, fit(HiFTStrategy(), 1))


def test_blocks_kept_by_half_of_the_processes():
    four = Processes(4)
    (first, _), *_ = succeeded(four.run(run_with_evaluation, 2, 4))
    four.close()
    assert_close(first, fit(HiFTStrategy(), 1))


# --- precision, slices ------------------------------------------------------------------------------------------------


def run_options(options):
    strategy = HiFTFSDPStrategy(**options.pop("strategy", {}))
    return fit(strategy, 2, **options)


SLICED = {"strategy": {"max_group_numel": 100}, "make_optimizer": adamw}


def test_blocks_are_recomputed_to_stay_within_a_budget(two):
    options = {"strategy": {"activation_budget": 11_000}, "module": Manual}
    first, _ = succeeded(two.run(run_options, options))
    assert_close(first, fit(HiFTStrategy(), 1, module=Manual))


def test_slices_of_parts_change_no_bit(two):
    sliced, _ = succeeded(two.run(run_options, SLICED))
    plain, _ = succeeded(two.run(run_options, {"make_optimizer": adamw}))
    assert all(torch.equal(sliced[name], plain[name]) for name in plain)


@pytest.mark.parametrize("masters", ["split", "full"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_masters(masters, clip, two):
    options = {"strategy": {"master_weights": masters}, "precision": "bf16-true", "gradient_clip_val": clip}
    first, second = succeeded(two.run(run_options, options))
    expected = fit(HiFTStrategy(master_weights=masters), 1, precision="bf16-true", gradient_clip_val=clip)
    for name in expected:
        assert first[name].dtype == torch.bfloat16
        assert torch.equal(first[name], second[name])
        # Gradients of each process are rounded to 8 bits of mantissa before they are averaged.
        torch.testing.assert_close(first[name], expected[name], rtol=2**-6, atol=2e-3, msg=name)


def test_mixed_precision(two):
    first, _ = succeeded(two.run(run_options, {"precision": "bf16-mixed"}))
    expected = fit(HiFTStrategy(), 1, precision="bf16-mixed")
    for name in expected:
        torch.testing.assert_close(first[name], expected[name], rtol=2**-6, atol=2e-3, msg=name)


# --- checkpoints ------------------------------------------------------------------------------------------------------


class GradientsAt(Automatic):
    """Calls something in the middle of a step."""

    @staticmethod
    def at_step_8():
        pass

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 8:
            self.at_step_8()


def run_until(path, steps, resumed=None, world=2, precision="32-true", make_optimizer=adamw):
    model = GradientsAt(make_optimizer)
    run = trainer(
        strategy=HiFTFSDPStrategy() if world > 1 else HiFTStrategy(),
        devices=world,
        max_steps=steps,
        max_epochs=-1,
        precision=precision,
        callbacks=[as_published(order="random", reshuffle=True, seed=3)],
        use_distributed_sampler=False,
    )
    held = ResumableLoader([batch[run.global_rank :: world] for batch in tokens(13, ROWS * 2)])
    if resumed is not None:
        held.load_state_dict({"next": 7})
    run.fit(model, held, ckpt_path=resumed, weights_only=None if resumed is None else True)
    if path is not None:
        run.save_checkpoint(path)
    return whole(model)


def choose_turns_of(path, steps, resumed):
    callback = HiFTCallback()
    run = trainer(strategy=HiFTFSDPStrategy(), devices=2, max_steps=steps, max_epochs=-1, callbacks=[callback])
    run.fit(Automatic(), loader(rows(4, 2), 2, run.global_rank), ckpt_path=resumed)
    run.save_checkpoint(path)
    return list(callback.turns)


def test_resumes_with_the_groups_of_a_shorter_run(two, tmp_path):
    first = succeeded(two.run(choose_turns_of, tmp_path / "4.ckpt", 4, None))
    again = succeeded(two.run(choose_turns_of, tmp_path / "5.ckpt", 5, tmp_path / "4.ckpt"))
    assert first == again
    assert first[0] == [3, 1, False]  # not as in a run whose length is not known


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resumes_bit_for_bit(precision, two, tmp_path):
    path = tmp_path / "7.ckpt"
    expected = succeeded(two.run(run_until, None, 11, None, 2, precision))[0]
    succeeded(two.run(run_until, path, 7, None, 2, precision))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7.ckpt"]
    resumed = succeeded(two.run(run_until, None, 11, path, 2, precision))[0]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)

    main(["consolidate", "--checkpoint", str(path), "--output", str(tmp_path / "one.ckpt")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7.ckpt", "one.ckpt"]
    again = succeeded(two.run(run_until, None, 11, tmp_path / "one.ckpt", 2, precision))[0]
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    alone = run_until(None, 11, tmp_path / "one.ckpt", 1, precision)
    for name, value in alone.items():
        # AdamW makes much of the small differences of sums in another order where a gradient is nearly zero.
        atol = 1e-4 if precision == "32-true" else 2e-2
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert {name.removeprefix("net.") for name in saved["state_dict"]} == set(expected)
    assert len(saved["optimizer_states"][0]["state"]) == len(expected)
    for name, p in Automatic(adamw).named_parameters():
        assert saved["state_dict"][name].shape == p.shape


def test_a_file_of_one_process_is_loaded_by_two(two, tmp_path):
    path = tmp_path / "one.ckpt"
    run_until(path, 7, world=1)
    expected = run_until(None, 11, path, world=1)
    found = succeeded(two.run(run_until, None, 11, path))[0]
    for name, value in expected.items():
        torch.testing.assert_close(value, found[name], rtol=0, atol=1e-4)


def test_a_folder_that_is_no_whole_checkpoint(tmp_path):
    (tmp_path / "half.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"is no folder of a sharded checkpoint: it has no meta\.pt"):
        consolidate(str(tmp_path / "half.ckpt"), str(tmp_path / "one.ckpt"))
    (tmp_path / "half.ckpt/meta.pt").touch()
    (tmp_path / "one.ckpt").touch()
    with pytest.raises(FileExistsError, match="Name another file"):
        consolidate(str(tmp_path / "half.ckpt"), str(tmp_path / "one.ckpt"))
    with pytest.raises(IsADirectoryError, match="lightning-hift consolidate --checkpoint"):
        run_until(None, 11, tmp_path / "half.ckpt", world=1)


class Predicting(Automatic):
    def predict_step(self, batch, batch_idx):
        return self.net(batch).argmax(dim=-1)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", next_token_loss(self.net, batch))


def run_course(folder, world=2):
    """Fit with checkpoints, validate, test and predict from the last one, and fit again."""

    def make(**options):
        keep = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=1, save_last=True, filename="{step}")
        return trainer(
            strategy=HiFTFSDPStrategy() if world > 1 else HiFTStrategy(),
            devices=world,
            callbacks=[as_published(), keep],
            enable_checkpointing=True,
            use_distributed_sampler=False,
            **options,
        )

    model = Predicting(sgd)
    run = make()
    data = loader(rows(11, 2), world, run.global_rank)
    run.fit(model, data, data)
    (first,) = run.validate(model, data, verbose=False)
    kept = sorted(path.name for path in folder.iterdir())
    del model
    fresh, run = Predicting(sgd), make()
    last = folder / "last.ckpt"
    (validated,) = run.validate(fresh, data, ckpt_path=last, weights_only=True, verbose=False)
    (tested,) = run.test(fresh, data, verbose=False)
    predicted = run.predict(fresh, data)
    run = make(max_steps=2)
    run.fit(fresh, data)
    return first, kept, validated, tested, predicted, whole(fresh)


def test_checkpoints_evaluation_and_another_fit(two, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    first, second = succeeded(two.run(run_course, tmp_path / "two"))
    expected = run_course(tmp_path / "one", world=1)
    assert first[1] == expected[1] == ["last.ckpt", "step=9.ckpt"]
    assert (tmp_path / "two/last.ckpt/meta.pt").is_file()
    for found, right in zip((*first[2:4], first[0]), (*expected[2:4], expected[0]), strict=True):
        assert found.keys() == right.keys()
    both = [torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(first[4], second[4], strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(both, expected[4], strict=True))
    assert_close(first[5], expected[5])


def run_uneven(what, batch_size):
    """7 rows, which two processes cannot share; validation gets one of them twice."""
    run = trainer(strategy=HiFTFSDPStrategy(), devices=2, callbacks=[as_published()], limit_val_batches=10)
    seven = torch.utils.data.Subset(rows(1, 2), range(7))
    if what == "predict":
        return [len(part) for part in run.predict(Predicting(sgd), DataLoader(seven, batch_size))]
    return run.fit(Predicting(sgd), DataLoader(seven, batch_size), DataLoader(seven, 3 + run.global_rank))


@pytest.mark.parametrize(("what", "counts"), [("predict", (4, 3)), ("validate", (2, 1))])
def test_different_numbers_of_batches_are_refused(what, counts, two):
    for error in two.run(run_uneven, what, 1):
        assert isinstance(error, RuntimeError)
        first, second = counts
        assert f"Process 0 has [{first}] batches to {what}, process 1 has [{second}]" in str(error)


def test_other_batch_sizes_predict_all_rows(two):
    assert succeeded(two.run(run_uneven, "predict", 2)) == [[2, 2], [2, 1]]


def run_full_disk(path):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    StreamingCheckpointIO.save_checkpoint = refuse  # which the first process alone calls
    return run_until(path, 9, path)


def run_unwritable(path):
    return run_until(path / "file/9.ckpt", 9)


def test_a_full_disk_ends_all_processes_and_leaves_the_checkpoint_before(two, tmp_path):
    path = tmp_path / "7.ckpt"
    succeeded(two.run(run_until, path, 7))
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    doomed = Processes(2)
    for error in doomed.run(run_full_disk, path):
        assert isinstance(error, OSError)
        assert "No space left" in str(error)
    doomed.close()
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    (tmp_path / "file").touch()
    for error in two.run(run_unwritable, tmp_path):
        assert isinstance(error, NotADirectoryError)


class Wider(Automatic):
    """More words than the checkpoint knows."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net.embedding = torch.nn.Embedding(VOCABULARY + 3, self.net.embedding.embedding_dim)


def run_wider(path):
    run = trainer(strategy=HiFTFSDPStrategy(), devices=2, callbacks=[as_published()])
    run.validate(Wider(sgd), loader(rows(2, 2), 2, run.global_rank), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("one_file", [False, True])
def test_weights_of_other_shapes_are_refused(one_file, two, tmp_path):
    path = tmp_path / "2.ckpt"
    run_until(path, 2, world=1) if one_file else succeeded(two.run(run_until, path, 2))
    for error in two.run(run_wider, path):
        assert isinstance(error, RuntimeError)
        assert "size mismatch for net.embedding.weight" in str(error)


# --- other modules ----------------------------------------------------------------------------------------------------


class OwnManual(Automatic):
    """Optimizes manually, in a training_step of its own."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(next_token_loss(self.net, batch))
        optimizer.step()


class Tied(Automatic):
    """The head has the weight of the embedding."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net.head.weight = self.net.embedding.weight


class TiedBlocks(Automatic):
    """Two blocks share a weight."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net.blocks[2].up.weight = self.net.blocks[0].up.weight


class OwnParameter(Automatic):
    """A parameter that is in no submodule."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.scale = torch.nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale.mean()


class ShardedByItself(Automatic):
    policy = MixedPrecisionPolicy()

    def configure_model(self):
        if self.trainer.world_size > 1:
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=self.policy)


class TwoOptimizers(Automatic):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(next_token_loss(self.net, batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        last = [*self.net.blocks[2].parameters(), *self.net.head.parameters()]
        first = [p for p in self.parameters() if all(p is not other for other in last)]
        return self.make_optimizer(first), self.make_optimizer(last)


class Compiled(Automatic):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        for block in self.net.blocks:
            block.compile(backend="eager")


class Language(HiFTModule):
    """A language model of transformers, whose head is used outside of its forward; blocks are recomputed."""

    def __init__(self, make_optimizer, kind="llama", **more):
        super().__init__()
        torch.manual_seed(5)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        self.net = language_model(kind, {**sizes, "num_key_value_heads": 1, "vocab_size": VOCABULARY, **more})
        self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.make_optimizer = make_optimizer

    def training_loss(self, batch, batch_idx):
        return chunked_loss(self.net, {"input_ids": batch}, batch, chunk_tokens=7)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class LanguageMixture(Language):
    """With more experts than the tokens of a batch may need."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer, "mixtral", num_local_experts=16, num_experts_per_tok=2)


MODULES = [
    Language,
    LanguageMixture,
    Compiled,
    OwnManual,
    Tied,
    TiedBlocks,
    OwnParameter,
    ShardedByItself,
    TwoOptimizers,
]


def run_module(module):
    return fit(HiFTFSDPStrategy(), 2, module=module)


@pytest.mark.parametrize("module", MODULES)
def test_modules(module, two):
    first, second = succeeded(two.run(run_module, module))
    assert_close(first, fit(HiFTStrategy(), 1, module=module))
    assert all(torch.equal(first[key], second[key]) for key in first)


class ShardedInBfloat16(ShardedByItself):
    """Computes in bfloat16, with gradients that are summed up in float32."""

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.dtypes = set()

    def on_after_backward(self):
        self.dtypes.update(p.grad.dtype for p in self.parameters() if p.grad is not None)


def run_in_bfloat16():
    model = ShardedInBfloat16(sgd)
    return fit(HiFTFSDPStrategy(), 2, module=lambda _: model), model.dtypes


def test_a_module_with_a_precision_of_its_own(two):
    expected = fit(HiFTStrategy(), 1)
    for found, dtypes in succeeded(two.run(run_in_bfloat16)):
        assert dtypes == {torch.float32}
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-3)  # 8 bits of activations


class OwnManualParameter(OwnManual):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.scale = torch.nn.Parameter(torch.ones(3))


class TiedBySharding(ShardedByItself):
    def configure_model(self):
        self.net.head.weight = self.net.embedding.weight
        fully_shard(self.net.embedding, mesh=self.device_mesh["data_parallel"])
        super().configure_model()


class OneInDouble(Automatic):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net.blocks[1].norm.double()


class Lars(torch.optim.SGD):
    """Divides each gradient by its norm."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / (p.grad.norm() + 1e-8), alpha=0.01)
        return loss


def lars(parameters):
    return Lars(parameters, lr=0.01)


REFUSED = {
    "16-true": ({"precision": "16-true"}, "'bf16-true' or 'bf16-mixed', which need no scaling"),
    "own parameters": ({"module": OwnManualParameter}, "has the parameters ['scale'] of its own"),
    "not element-wise": ({"make_optimizer": lars}, "Lars does not compute the same for parts of a parameter"),
    "tied over shards": ({"module": TiedBySharding}, "shared"),
    "two dtypes in a block": ({"module": OneInDouble}, "Convert all to one dtype, use precision='bf16-true'"),
}


def run_refused(name):
    return fit(HiFTFSDPStrategy(), 2, **REFUSED[name][0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused(name, two):
    for error in two.run(run_refused, name):
        assert isinstance(error, Exception)
        assert REFUSED[name][1] in str(error)


def run_with_rank():
    rank = int(os.environ["LOCAL_RANK"])
    return fit(HiFTFSDPStrategy(), 2, callback={"group_size": 1 + rank})


def test_processes_that_differ_are_refused_at_the_start(two):
    for error in two.run(run_with_rank):
        assert isinstance(error, RuntimeError)
        assert "Process 1 differs from process 0 in layer groups" in str(error)


# --- parameters that not all processes use ----------------------------------------------------------------------------


class Mixture(torch.nn.Module):
    """Each token goes to one of the experts."""

    def __init__(self, experts=12):
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, experts)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(experts)])
        self.used = []

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            out = out + (chosen == index).unsqueeze(-1) * self.experts[index](x)
        self.used.append(set(chosen.unique().tolist()))
        return x + weight.unsqueeze(-1) * out


class Experts(Automatic):
    """Two of the blocks have experts, and nobody uses the spare layer."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        for index in range(2):
            self.net.blocks[index] = Mixture()
        self.net.head.spare = torch.nn.Linear(4, 4)
        self.reached = []

    def on_after_backward(self):
        self.reached.append([name for name, p in self.named_parameters() if p.grad is not None])


def decaying(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.3)


EXPERTS = {
    "automatic": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "slices": {"strategy": {"max_group_numel": 20}},
    "recomputed": {"strategy": {"activation_budget": 9000}},
    "kept": {"strategy": {"reshard_after_forward": False}},
}


def run_experts(name, world=2):
    model, options = Experts(decaying), dict(EXPERTS[name])
    of_strategy = options.pop("strategy", {})
    strategy = HiFTFSDPStrategy(**of_strategy) if world > 1 else HiFTStrategy()
    found = fit(strategy, world, module=lambda _: model, steps=12, **options)
    return found, [block.used for block in model.net.blocks[:2]], model.reached


@pytest.mark.parametrize("name", EXPERTS)
def test_what_no_process_uses_has_no_gradient_as_in_one(name, two):
    (first, used, reached), (second, used_there, reached_there) = succeeded(two.run(run_experts, name))
    expected, _, reached_in_one = run_experts(name, 1)
    assert any(here != there for here, there in zip(used[0] + used[1], used_there[0] + used_there[1], strict=True))
    assert (len(used[0] + used[1]) > 2 * 12) == (name == "recomputed")
    assert reached == reached_there == reached_in_one
    assert any(len([n for n in step if ".experts." in n]) not in (0, 24) for step in reached)
    assert_close(first, expected)
    assert all(torch.equal(first[key], second[key]) for key in first)


class Idle(torch.nn.Module):
    """Its result does not depend on its parameters."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.linear(x)
        return x


class WithIdleBlock(Automatic):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net.blocks[1] = Idle()


def run_unreached():
    return fit(HiFTFSDPStrategy(), 2, module=WithIdleBlock)


def test_a_group_that_the_loss_does_not_reach_is_refused(two):
    for error in two.run(run_unreached):
        assert isinstance(error, RuntimeError)
        assert "Layer group 2 (net.blocks.1) has never had a gradient" in str(error)


# --- more processes ---------------------------------------------------------------------------------------------------


def run_rows_in(world, **options):
    model = Automatic(sgd)
    run = trainer(
        strategy=HiFTFSDPStrategy() if world > 1 else HiFTStrategy(),
        devices=world,
        callbacks=[as_published()],
        use_distributed_sampler=False,
        **options,
    )
    dataset = Rows(tokens(8, 6))
    sampler = DistributedSampler(dataset, world, run.global_rank, shuffle=False) if world > 1 else None
    run.fit(model, DataLoader(dataset, batch_size=6 // world, sampler=sampler))
    return whole(model)


def test_three_processes_of_which_some_have_no_part(three):
    found = succeeded(three.run(run_rows_in, 3))
    expected = run_rows_in(1)
    for each in found:
        assert_close(each, expected)


class Reports(pl.Callback):
    def on_train_start(self, run, module):
        (engine,) = run.callbacks[0].engines
        ask = engine.first_sweep_report
        self.reports = []
        engine.first_sweep_report = lambda: self.reports.append(ask()) or self.reports[-1]


def run_watched(folder, world):
    model, reports, updates = Automatic(sgd), Reports(), LayerUpdates(folder, plot=False)
    run = trainer(
        strategy=HiFTFSDPStrategy() if world > 1 else HiFTStrategy(),
        devices=world,
        callbacks=[as_published(), reports, updates],
        use_distributed_sampler=False,
    )
    run.fit(model, DataLoader([batch[run.global_rank :: world] for batch in tokens(11, 12)], batch_size=None))
    return [report for report in reports.reports if report is not None], updates.rows


def test_what_all_processes_did_is_reported(three, tmp_path):
    (expected,), rows_of_one = run_watched(tmp_path / "one", 1)
    for (report,), found in succeeded(three.run(run_watched, tmp_path / "three", 3)):
        assert report == expected
        assert report.complete
        assert len(found) == len(rows_of_one)
        for row, other in zip(found, rows_of_one, strict=True):
            assert [row[key] for key in ("sweep", "unit", "parameters", "steps")] == [
                other[key] for key in ("sweep", "unit", "parameters", "steps")
            ]
            # float32 gradients, summed up in another order
            assert row["update"] == pytest.approx(other["update"], rel=1e-4)


def run_in(world, path, steps, resumed=None):
    return run_until(path, steps, resumed, world)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_resumes_with_another_number_of_processes(before, after, two, three, tmp_path):
    processes = {2: two, 3: three}
    succeeded(processes[before].run(run_in, before, tmp_path / "7.ckpt", 7))
    resumed = succeeded(processes[after].run(run_in, after, None, 11, tmp_path / "7.ckpt"))[0]
    expected = run_until(None, 11, world=1)
    for name, value in expected.items():
        # AdamW makes much of the small differences of sums in another order where a gradient is nearly zero.
        torch.testing.assert_close(value, resumed[name], rtol=0, atol=1e-4)


def run_writing(folder, world):
    pairs = [(text, "c") for text in "adfhbceg"]  # the first process has those that are answered at once
    data = data_of(folder, rows_of(*pairs), cache_dir=str(folder / f"cache{world}"), batch_size=8 // world)
    module = module_of(model_config={**SMALL, **WIDE}, generation={"max_new_tokens": 9})
    run = trainer(strategy=HiFTFSDPStrategy() if world > 1 else HiFTStrategy(), devices=world)
    return [record for batch in run.predict(module, datamodule=data) for record in batch]


def test_processes_write_texts_of_different_lengths(two, tmp_path):
    word_tokenizer([">", "do", *LETTERS], tmp_path / "tokenizer")
    found = succeeded(two.run(run_writing, tmp_path, 2))
    expected = {record["source"]: record["prediction"] for record in run_writing(tmp_path, 1)}
    assert {record["source"]: record["prediction"] for part in found for record in part} == expected
    longest = [max(len(record["prediction"].split()) for record in part) for part in found]
    assert longest[0] != longest[1]


# --- faults -----------------------------------------------------------------------------------------------------------


def run_killed(path, where):
    """Train to step 7 and save there; the second process is killed at the 8th step, or while it saves again."""
    if os.environ["LOCAL_RANK"] == "1":
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        if where == "save":
            sharded_checkpoint.save = lambda *_, **__: kill()
        else:
            GradientsAt.at_step_8 = kill
    return run_until(path, 9, path, make_optimizer=adamw)


@pytest.mark.parametrize("where", ["save", "step"])
def test_a_process_that_is_killed_stops_the_others_and_loses_nothing(where, two, tmp_path):
    path = tmp_path / "7.ckpt"
    expected = succeeded(two.run(run_until, None, 11))[0]
    succeeded(two.run(run_until, path, 7))
    doomed = Processes(2)
    since = time.monotonic()
    left, killed = doomed.run(run_killed, path, where)
    assert time.monotonic() - since < 100  # far below the time limit of 10 minutes
    doomed.close()
    assert isinstance(left, RuntimeError)
    assert isinstance(killed, EOFError)
    resumed = succeeded(two.run(run_until, None, 11, path))[0]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
