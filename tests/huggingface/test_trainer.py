"""HiFT in transformers' Trainer is HiFT in a plain loop, and with one group the plain Trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback

from lightning_hift import HFT, IST, LISA, BAdam, HiFTEngine, SweepLR
from tests.huggingface.runs import (
    ALL_AT_ONCE,
    ONE_BY_ONE,
    Recorder,
    arguments,
    assert_same,
    hift,
    logged,
    network,
    rows,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:This run has about")


def trained(make, folder, name="llama", model=None, resume=None, **more):
    data = {"train_dataset": rows(name)}
    for key in ("callbacks", "compute_loss_func", "optimizers", "optimizer_cls_and_kwargs"):
        if key in more:
            data[key] = more.pop(key)
    if more.get("eval_strategy") or more.get("eval_on_start"):
        data["eval_dataset"] = rows(name, 4)
    trainer = make(model or network(name), arguments(folder, **more), **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# --- one group: the plain Trainer ------------------------------------------------------------------------------------


def mean_loss(outputs, labels, num_items_in_batch=None):
    return (
        nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        / num_items_in_batch
    )


OPTIMIZERS = ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "stable_adamw", "schedule_free_adamw"]


@pytest.mark.parametrize("name", ["llama", "tied", "classifier", "seq2seq"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "bf16": True},
    ],
    ids=["plainly", "unaccumulated", "smoothed"],
)
def test_one_group_is_the_plain_trainer(tmp_path, name, more):
    if name == "seq2seq":  # which gets no inputs for its decoder where somebody else computes the loss
        more = {key: value for key, value in more.items() if key != "label_smoothing_factor"}
    plain = trained(Recorder, tmp_path, name, **more)
    ours = trained(hift(ALL_AT_ONCE, Recorder), tmp_path, name, **more)
    assert ours.losses == plain.losses
    assert_same(weights(ours), weights(plain))
    assert logged(ours, "loss", "grad_norm", "learning_rate") == logged(plain, "loss", "grad_norm", "learning_rate")


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_one_group_is_the_plain_trainer_with_any_optimizer(tmp_path, optim):
    if optim == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    more = {"optim": optim, "lr_scheduler_type": "constant" if "free" in optim else "linear"}
    try:
        plain = trained(Trainer, tmp_path, **more)
    except (ImportError, ValueError) as error:  # transformers asks for packages that are not there
        pytest.skip(str(error))
    assert_same(weights(trained(hift(ALL_AT_ONCE), tmp_path, **more)), weights(plain))


def test_loss_functions_of_the_user(tmp_path):
    plain, ours = (
        trained(make, tmp_path, compute_loss_func=mean_loss) for make in (Recorder, hift(ALL_AT_ONCE, Recorder))
    )
    assert ours.losses == plain.losses
    assert_same(weights(ours), weights(plain))


def own_optimizers(model):
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.02)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=12)


def test_optimizer_and_scheduler_of_the_user(tmp_path):
    def run(make):
        model = network()
        return trained(make, tmp_path, model=model, optimizers=own_optimizers(model))

    plain, ours = run(Trainer), run(hift(ALL_AT_ONCE))
    assert_same(weights(ours), weights(plain))
    assert_same(ours.lr_scheduler.state_dict(), plain.lr_scheduler.state_dict())
    assert type(ours.lr_scheduler) is torch.optim.lr_scheduler.OneCycleLR


def test_learning_rates_by_metric(tmp_path):
    more = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 1.0, "mode": "min"},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    }
    plain, ours = trained(Trainer, tmp_path, **more), trained(hift(ALL_AT_ONCE), tmp_path, **more)
    assert plain.optimizer.param_groups[0]["lr"] < 0.001
    assert_same(weights(ours), weights(plain))


# --- several groups: a plain loop ------------------------------------------------------------------------------------


def plain_loop(trainer, options, dtype=torch.float32):
    """The plainest way to HiFT on the micro-batches that ``trainer`` has seen; losses, and weights at the end."""
    options = {"seed": trainer.args.seed, **options}
    hold_lr = options.pop("hold_lr", "replay")
    model = network(attention_dropout=0.0).to(dtype)
    decay = [p for name, p in model.named_parameters() if "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 0.01, fused=True)
    engine = HiFTEngine.attach(model, optimizer, **options)
    scheduler = transformers.get_scheduler("linear", optimizer, 0, 12)
    scheduler = SweepLR(scheduler, engine, hold_lr, total_steps=12)
    losses, rates, of_step = [], [], []
    for number, (inputs, items) in enumerate(trainer.batches, start=1):
        loss = model(**inputs, num_items_in_batch=items).loss
        loss.backward()
        losses.append(float(loss.detach()))
        engine.observe(losses[-1])
        of_step.append(number)
        if len(of_step) == 2 or number % 11 == 0:  # the last one of an epoch is alone
            engine.prepare_step()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.05)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            of_step = []
    engine.close()
    return losses, rates, {name: p.detach() for name, p in model.named_parameters()}


GROUPS = {
    "one by one": ONE_BY_ONE,
    "top2down": {"group_size": 2, "steps_per_group": 2, "order": "top2down", "hold_lr": "once"},
    "random": {"group_size": 1, "steps_per_group": 1, "order": "random", "reshuffle": True, "hold_lr": "off"},
    "head always": {"group_size": 1, "steps_per_group": 1, "always_active": ["head"], "lr_scale": 1.0},
    "frozen": {"group_size": 1, "steps_per_group": 1, "frozen": ["model.embed_tokens"]},
    "slices": {"group_size": 1, "steps_per_group": 1, "max_group_numel": 300, "offload": "none"},
    "LISA": {"policy": LISA(num_blocks=2, steps_per_draw=3)},
    "BAdam": {"policy": BAdam(steps_per_block=2)},
    "HFT": {"policy": HFT(steps_per_half=2)},
    "IST": {"policy": IST(num_blocks=1, steps_per_draw=2, importance_rate=5.0)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
def test_groups_train_as_in_a_plain_loop(tmp_path, options, dtype):
    model = network(attention_dropout=0.0).to(dtype)
    trainer = trained(hift(options, Recorder), tmp_path, model=model)
    losses, rates, expected = plain_loop(trainer, options, dtype)
    assert trainer.losses == losses
    assert [rate for (rate,) in logged(trainer, "learning_rate")] == rates
    assert_same(weights(trainer), expected)
    changed = [name for name, w in network().named_parameters() if not torch.equal(w.to(dtype), expected[name])]
    assert len(changed) >= 6


# --- resume ----------------------------------------------------------------------------------------------------------


def files(folder, step):
    """All that a checkpoint holds."""
    path = folder / f"checkpoint-{step}"
    names = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    return [torch.load(path / name, weights_only=name != "rng_state.pth") for name in names]


def assert_resumes(tmp_path, make, steps, **more):
    whole = trained(make, tmp_path / "whole", save_strategy="steps", save_steps=1, **more)
    for step in steps:
        folder = tmp_path / f"from {step}"
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        again = trained(make, folder, save_strategy="steps", save_steps=1, resume=checkpoint, **more)
        assert_same(weights(again), weights(whole))
        assert_same(files(folder, 12)[:2], files(tmp_path / "whole", 12)[:2])
        assert logged(again, "loss", "learning_rate", "hift/group") == logged(
            whole, "loss", "learning_rate", "hift/group"
        )


@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    assert_resumes(tmp_path, hift(options), [3, 6, 7], warmup_steps=2)  # an epoch is of 6 steps


@pytest.mark.slow
@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_resumes_from_any_step(tmp_path, options, dtype):
    class Mixed(hift(options)):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model.to(getattr(torch, dtype)), *args, **kwargs)

    assert_resumes(tmp_path, Mixed, range(1, 12), warmup_steps=2)


MORE = {
    "master weights": {"model_dtype": torch.bfloat16},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 1.0, "mode": "min"},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    },
    "evaluation and autocast": {"eval_strategy": "steps", "eval_steps": 1, "bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "adafactor": {"optim": "adafactor"},
    "cosine": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.001}},
    "noise": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore::FutureWarning")
def test_a_resumed_run_is_the_uninterrupted_one_whatever_else_is_on(tmp_path, more):
    more = dict(more)
    dtype = more.pop("model_dtype", torch.float32)

    class Mixed(hift({"group_size": 1, "steps_per_group": 2, "frozen": ["model.layers.1"]})):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model.to(dtype), *args, **kwargs)

    assert_resumes(tmp_path, Mixed, [3, 6], **more)


def test_a_longer_run_resumes_with_the_turns_of_the_shorter_one(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            turns.append(state.stateful_callbacks["hift"]["turns"])
            control.should_training_stop = state.global_step >= 8

    turns = []
    more = {"callbacks": [Stop()], "save_strategy": "steps", "save_steps": 6}
    trained(hift({}), tmp_path, **more)
    trained(hift({}), tmp_path / "more", resume=str(tmp_path / "checkpoint-6"), **more, max_steps=1000)
    assert len(turns) == 8 + 2
    assert len(set(map(str, turns))) == 1
    trained(hift({}), tmp_path / "anew", **more, max_steps=1000)
    assert turns[-1] != turns[0]  # what a run of that length would have


def test_checkpoints_are_those_of_the_plain_trainer(tmp_path):
    trained(hift(ONE_BY_ONE), tmp_path / "ours", save_strategy="steps", save_steps=6)
    trained(Trainer, tmp_path / "plain", save_strategy="steps", save_steps=6)
    assert {path.name for path in (tmp_path / "ours" / "checkpoint-6").iterdir()} == {
        path.name for path in (tmp_path / "plain" / "checkpoint-6").iterdir()
    }
    trained(Trainer, tmp_path / "a", resume=str(tmp_path / "ours" / "checkpoint-6"))
    opened = trained(hift(ALL_AT_ONCE), tmp_path / "b", resume=str(tmp_path / "plain" / "checkpoint-6"))
    assert_same(weights(opened), weights(trained(Trainer, tmp_path / "c")))


def test_another_grouping_is_refused(tmp_path):
    trained(hift(ONE_BY_ONE), tmp_path, save_strategy="steps", save_steps=6)
    with pytest.raises(ValueError, match="group_size"):
        trained(hift({**ONE_BY_ONE, "group_size": 2}), tmp_path, resume=str(tmp_path / "checkpoint-6"))


# --- around the steps ------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes at each event what is trainable, and of which dtype weights are."""

    def __init__(self):
        self.trainable, self.dtypes = set(), set()

    def note(self, args, state, control, model=None, **kwargs):
        self.trainable.add(tuple(name for name, p in model.named_parameters() if p.requires_grad))
        self.dtypes |= {p.dtype for p in model.parameters()}

    on_train_begin = on_epoch_begin = on_step_begin = on_substep_end = on_step_end = on_evaluate = on_save = note
    on_epoch_end = on_log = on_train_end = note


def test_between_steps_the_model_is_the_users_own(tmp_path):
    watch = Watch()
    model = network().to(torch.bfloat16)
    model.model.layers[1].requires_grad_(False)
    expected = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    more = {"callbacks": [watch], "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    ours = trained(hift({**ONE_BY_ONE, "frozen": ["model.embed_tokens"]}), tmp_path, model=model, **more)
    assert watch.trainable == {expected}
    assert watch.dtypes == {torch.bfloat16}
    assert ours.hift_engine is None


def test_evaluation_changes_nothing(tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    quiet, loud = (
        trained(hift(ONE_BY_ONE), tmp_path, model=network(attention_dropout=0.0), **each) for each in ({}, more)
    )  # evaluation draws random numbers, with and without HiFT
    assert_same(weights(loud), weights(quiet))


def test_what_is_logged(tmp_path, capsys):
    ours = trained(hift({**ONE_BY_ONE, "lr_scale": 2.0}), tmp_path)
    assert [group for (group,) in logged(ours, "hift/group")] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert [sweep for (sweep,) in logged(ours, "hift/sweep")] == [0] * 4 + [1] * 5 + [2] * 3
    for shown, used in logged(ours, "learning_rate", "hift/lr"):
        assert used == pytest.approx(2 * shown)
    printed = capsys.readouterr().out
    assert "At most 1,952 of 6,896 parameters train at once" in printed
    assert printed.count("first sweep done, all 30 trainable parameters were updated") == 1


def test_parameters_that_do_not_move_are_named(tmp_path):
    model = network()
    model.unused = nn.Linear(2, 2)
    model.model.layers[2].unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"received no gradient.*model.layers.2.unused"):
        trained(hift({**ONE_BY_ONE, "frozen": ["unused"]}), tmp_path, model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_calls_of_train(tmp_path, dtype):
    """The second one goes on with optimizer and position of the first, and with a schedule of its own."""
    model = network(attention_dropout=0.0).to(dtype)
    ours = trained(hift(ONE_BY_ONE, Recorder), tmp_path, model=model)
    between, rates = weights(ours), logged(ours, "learning_rate")
    ours.train()
    assert logged(ours, "hift/group")[0] == [2]
    second = [rate for (rate,) in logged(ours, "learning_rate")]
    # Position 12 of sweeps of 5: three steps, two sweeps, and four steps that the schedule is then at its end for.
    assert second[:3] == [pytest.approx(sum(0.01 * (12 - i) / 12 for i in (0, 1, 2)) / 3)] * 3
    assert second[-4:] == [pytest.approx(sum(0.01 * (12 - i) / 12 for i in range(8, 12)) / 4)] * 4
    assert all(not torch.equal(w, between[name]) for name, w in weights(ours).items())
    assert len(rates) == len(second) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_weights_are_loaded_and_trained_on(tmp_path, dtype):
    more = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    ours = trained(hift(ONE_BY_ONE), tmp_path, model=network().to(dtype), **more)
    best = ours.state.best_model_checkpoint
    assert best.endswith("checkpoint-4")
    saved = type(ours.model).from_pretrained(best, dtype=dtype)
    assert_same(weights(ours), {name: p.detach() for name, p in saved.named_parameters()})
    before = weights(ours)
    ours.args.load_best_model_at_end, ours.args.max_steps, ours.args.learning_rate = False, 5, 0.0
    ours.args.weight_decay = 0.0
    for group in ours.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    ours.train()  # at a learning rate of 0
    assert_same(weights(ours), before)


def test_after_training_the_optimizer_is_an_ordinary_one(tmp_path):
    ours = trained(hift(ONE_BY_ONE), tmp_path, lr_scheduler_type="constant")
    assert all(p.requires_grad for p in ours.model.parameters())
    before = weights(ours)
    sum(p.sum() for p in ours.model.parameters()).backward()
    ours.optimizer.step()
    assert not any(torch.equal(w, before[name]) for name, w in weights(ours).items())


def test_a_run_that_dies_leaves_the_model_as_it_was(tmp_path):
    class Fails(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    model = network().to(torch.bfloat16)
    make = hift(ONE_BY_ONE)(model, arguments(tmp_path), train_dataset=rows(), callbacks=[Fails()])
    with pytest.raises(KeyboardInterrupt):
        make.train()
    assert make.hift_engine is None
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.slow
def test_smaller_batches_after_the_memory_was_full(tmp_path):
    """The tries of ``auto_find_batch_size``."""

    def small(make):
        class Small(make):
            def training_step(self, model, inputs, *args, **kwargs):
                loss = super().training_step(model, inputs, *args, **kwargs)
                if len(inputs["input_ids"]) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return loss

        return Small

    more = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    plain, ours = trained(small(Trainer), tmp_path, **more), trained(small(hift(ALL_AT_ONCE)), tmp_path, **more)
    assert ours._train_batch_size == plain._train_batch_size == 2
    assert_same(weights(ours), weights(plain))
    several = trained(small(hift(ONE_BY_ONE)), tmp_path, **more)
    assert [group for (group,) in logged(several, "hift/group")] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_model_that_is_made_by_the_trainer(tmp_path):
    made = hift(ONE_BY_ONE)(model_init=lambda: network(), args=arguments(tmp_path), train_dataset=rows())
    made.train()
    made.train()  # another one
    given = hift(ONE_BY_ONE)(model_init=lambda: network(), args=arguments(tmp_path), train_dataset=rows())
    given.train()
    assert_same(weights(made), weights(given))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_activation_checkpointing_changes_nothing(tmp_path):
    without = trained(hift(ONE_BY_ONE), tmp_path)
    assert_same(weights(trained(hift(ONE_BY_ONE), tmp_path, gradient_checkpointing=True)), weights(without))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpointing_is_refused(tmp_path):
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trained(hift(ONE_BY_ONE), tmp_path, **more)


def test_adapters_of_peft_take_turns(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(2)
        return peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))

    class Mixed(hift(ONE_BY_ONE)):
        def __init__(self, model, *args, **kwargs):
            super().__init__(adapted(), *args, **kwargs)

    assert_resumes(tmp_path, Mixed, [4])
    assert_same(
        weights(trained(hift(ALL_AT_ONCE), tmp_path, model=adapted())),
        weights(trained(Trainer, tmp_path, model=adapted())),
    )


def scaled(make, init_scale=2.0**126):
    """With the loss scaled as in mixed precision of float16, which accelerate has on GPUs only."""

    class Scaled(make):
        def create_optimizer(self, *args, **kwargs):
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
            self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
            return super().create_optimizer(*args, **kwargs)

        def train(self, *args, **kwargs):
            try:
                return super().train(*args, **kwargs)
            finally:
                self.accelerator.state._mixed_precision = "no"

    return Scaled


def test_overflowing_steps_are_skipped(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 1}
    plain = trained(scaled(Trainer), tmp_path / "plain", **more)
    ours = trained(scaled(hift(ALL_AT_ONCE)), tmp_path / "ours", **more)
    assert_same(weights(ours), weights(plain))
    assert plain.accelerator.scaler.get_scale() < 2.0**126
    assert_resumes(tmp_path, scaled(hift(ONE_BY_ONE)), [1, 2, 4, 7])


def test_a_sweep_whose_last_step_is_skipped_ends_there(tmp_path):
    class Overflows(scaled(hift(ONE_BY_ONE), 1.0)):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 4:
                self.model.lm_head.weight.grad.fill_(torch.inf)
            return loss

    rates = [rate for (rate,) in logged(trained(Overflows, tmp_path), "learning_rate")]
    plain = [0.01 * (12 - call) / 12 for call in range(12)]
    assert rates[:5] == [pytest.approx(sum(plain[:5]) / 5)] * 5
    assert rates[5:10] == [pytest.approx(sum(plain[4:9]) / 5)] * 5  # one call of the schedule less


# --- what does not go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed.*Leave it out"),
        ("is_fsdp_enabled", True, "FSDP.*hift_fsdp"),
        ("is_model_parallel", True, "several devices.*device_map"),
        ("args._n_gpu", 2, "DataParallel on 2 GPUs.*CUDA_VISIBLE_DEVICES=0"),
        ("args.optim", "galore_adamw_layerwise", "backward pass.*adamw_torch"),
        ("args.optim", "lomo", "backward pass.*adamw_torch"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, name, value, message):
    trainer = hift({})(network(), arguments(tmp_path), train_dataset=rows())
    *path, last = name.split(".")
    setattr(trainer.args if path else trainer, last, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    trainer = hift({})(network(), arguments(tmp_path), train_dataset=rows())
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match=r"2 processes.*python, not torchrun"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "sideways"}, ValueError, "sideways"),
        ({"hold_lr": "never"}, ValueError, "hold_lr='never'"),
        ({"gruppen": 1}, TypeError, "gruppen"),
    ],
)
def test_options_that_do_not_exist(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trained(hift(options), tmp_path)


def test_optimizers_that_cannot_are_refused(tmp_path):
    model = network()
    with pytest.raises(TypeError, match="LBFGS cannot train one layer group at a time"):
        trained(hift({}), tmp_path, model=model, optimizers=(torch.optim.LBFGS(model.parameters()), None))


def test_a_group_without_gradient(tmp_path):
    model = network()
    model.model.layers[1].forward = lambda x, *args, **kwargs: x
    with pytest.raises(RuntimeError, match=r"model.layers.1\) has never had a gradient"):
        trained(hift(ONE_BY_ONE), tmp_path, model=model)


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def test_whole_compilation_of_many_groups_gets_a_warning(tmp_path):
    few = torch._dynamo.config.patch(recompile_limit=5)
    with few, pytest.warns(UserWarning, match="once for each of 5 layer groups"):
        trained(hift(ONE_BY_ONE), tmp_path, **COMPILED, max_steps=1)


@pytest.mark.slow
def test_whole_compilation_with_one_group_is_that_of_the_plain_trainer(tmp_path):
    plain, ours = trained(Trainer, tmp_path, **COMPILED), trained(hift(ALL_AT_ONCE), tmp_path, **COMPILED)
    assert_same(weights(ours), weights(plain))


def test_the_import_is_light():
    code = (
        "import sys; from lightning_hift import HiFTTrainerMixin; print({'transformers', 'lightning'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "set()", result.stderr


def test_a_schedule_that_never_begins_is_refused(tmp_path):
    with pytest.raises(ValueError, match="never reaches 1 %"):
        trained(hift(ONE_BY_ONE), tmp_path, warmup_steps=100_000)
