"""Where state is kept: page-locked memory, pageable memory, files; and what happens if there is none of it."""

import gc
import os
import platform
import resource
import warnings
import weakref

import pytest
import torch

from lightning_hift import HiFTCallback, HiFTStrategy, StateOffloader
from lightning_hift.offload.host_memory import HostMemory
from tests.lagging import LaggingDevice
from tests.models import (
    Automatic,
    Net,
    ResumableLoader,
    adamw,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)


def train(offloader=None, steps=12, **options):
    model = Net()
    engine = attach_published(
        model, adamw(model.parameters()), make_offloader=(lambda: offloader) if offloader else None, **options
    )
    for batch in tokens(steps):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    return model, engine


# --- host memory ------------------------------------------------------------------------------------------------------


def test_memory_is_exact_and_aligned():
    memory = HostMemory()
    like = [torch.empty(3), torch.empty(4, 4), torch.empty((), dtype=torch.int16), torch.empty(5, dtype=torch.int16)]
    tensors = memory.allocate(like)
    assert [(t.numel(), t.dtype) for t in tensors] == [(t.numel(), t.dtype) for t in like]
    assert memory.nbytes == 4 * 19 + 2 * 6
    assert tensors[1].data_ptr() % 16 == 0
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [t.float().mean() for t in tensors] == [0, 1, 2, 3]


def test_memory_of_a_7b_block_is_not_rounded_up():
    block = [torch.empty(n, dtype=torch.float32, device="meta") for n in (4096 * 4096, 4096 * 11008, 4096)]
    memory = HostMemory()
    tensors = memory.allocate([t for t in block for _ in range(2)])
    exact = sum(2 * 4 * t.numel() for t in block)
    assert (
        sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values())
        == exact
    )
    assert memory.nbytes == exact


def test_memory_is_given_back():
    tensors = HostMemory().allocate([torch.empty(10), torch.empty(10)])
    gone = []
    weakref.finalize(tensors[0].untyped_storage(), gone.append, True)
    del tensors[0]
    gc.collect()
    assert not gone
    del tensors
    gc.collect()
    assert gone


def test_page_lock_is_asked_for_each_stretch(monkeypatch):
    locked = []
    monkeypatch.setattr(
        "lightning_hift.offload.host_memory.page_lock", lambda memory, device: locked.append(len(memory))
    )
    HostMemory(torch.device("cuda")).allocate([torch.empty(3), torch.empty(5), torch.empty(2, dtype=torch.int16)])
    assert locked == [32, 4]


def test_refused_page_lock_warns_once_and_goes_on(monkeypatch):
    asked = []

    def refuse(memory, device):
        asked.append(device)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lightning_hift.offload.host_memory.page_lock", refuse)
    memory = HostMemory(torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"refused \(out of memory\).*ulimit -l.*pin_memory=False"):
        first = memory.allocate([torch.ones(3)])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = memory.allocate([torch.ones(3)])[0]
    assert len(asked) == 1
    assert torch.equal(first.fill_(2), second.fill_(2))


# --- disk -------------------------------------------------------------------------------------------------------------


def offloaders(directory):
    yield StateOffloader("cpu", "disk", directory=directory)
    for eager in ((), ("load", "save")):
        yield StateOffloader(
            "cpu", "disk", directory=directory, device_module=LaggingDevice(eager=eager), always_copy=True
        )


@pytest.mark.parametrize("master_weights", ["none", "split", "full"])
@pytest.mark.parametrize("which", range(3), ids=["host", "lagging", "eager"])
def test_disk_changes_no_number(which, master_weights, tmp_path):
    options = {} if master_weights == "none" else {"weights_dtype": torch.bfloat16}
    options["master_weights"] = master_weights
    model, engine = train(list(offloaders(tmp_path))[which], **options)
    expected, other = train(**options)
    assert_same_weights(model, expected)
    for i, state in other.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, engine.optimizer.state_dict()["state"][i][k]) for k, v in state.items())


def test_state_is_in_files_while_it_is_used_and_they_go_at_the_end(tmp_path):
    model, engine = train(StateOffloader("cpu", "disk", directory=tmp_path))
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert (
        sum(f.stat().st_size for f in files)
        == engine.offloader.host_bytes
        > 8 * sum(p.numel() for p in model.parameters())
    )
    before = engine.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    engine.close()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(engine.optimizer.state_dict()["state"][0]["exp_avg"], before)


def test_files_go_with_their_owner(tmp_path):
    offloader = StateOffloader("cpu", "disk", directory=tmp_path)
    assert list(tmp_path.iterdir())
    del offloader
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / f"hift-state-{platform.node()}-999999999-old").mkdir()
    (tmp_path / "hift-state-notes").mkdir()
    HostMemory(directory=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["hift-state-notes"]


def test_trainer_with_disk(tmp_path):
    disk, host = Automatic(), Automatic()
    strategy = HiFTStrategy(offload="disk", offload_directory=str(tmp_path))
    seen = []

    class Look(HiFTCallback):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            seen.append(len(list(tmp_path.rglob("*.bin"))))

    run = trainer(strategy=strategy, callbacks=[Look(1, "bottom2up", steps_per_group=1, lr_scale=1.0)])
    run.fit(disk, loader(12))
    trainer(strategy="hift").fit(host, loader(12))
    assert_same_weights(disk, host)
    assert max(seen) > 0
    assert list(tmp_path.iterdir()) == []
    run.fit_loop.max_epochs = 2
    run.fit(disk, loader(12))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("saved_on", "resumed_on"), [("disk", "host"), ("host", "disk"), ("disk", "disk")])
def test_resume_on_another_tier(saved_on, resumed_on, tmp_path):
    def run(tier, steps, model, **options):
        options_of_tier = {"offload_directory": str(tmp_path)} if tier == "disk" else {}
        fitting = trainer(strategy=HiFTStrategy(offload=tier, **options_of_tier), max_steps=steps, max_epochs=None)
        fitting.fit(model, ResumableLoader(tokens(12)), **options)
        return fitting

    whole, half, rest = Automatic(), Automatic(), Automatic()
    run("host", 12, whole)
    run(saved_on, 7, half).save_checkpoint(tmp_path / "c.ckpt")
    run(resumed_on, 12, rest, ckpt_path=tmp_path / "c.ckpt")
    assert_same_weights(rest, whole)


class LimitedFiles:
    """No file may grow beyond ``nbytes``, as on a full disk."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.nbytes, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("always_copy", [False, True])
def test_full_disk_is_an_error_that_loses_no_state(always_copy, tmp_path):
    device = LaggingDevice() if always_copy else None
    offloader = StateOffloader("cpu", "disk", directory=tmp_path, device_module=device, always_copy=always_copy)
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), make_offloader=lambda: offloader)

    def run():
        for batch in tokens(5):
            next_token_loss(model, batch).backward()
            engine.optimizer.step()

    with LimitedFiles(1200), pytest.raises(OSError, match=r"Could not reserve 2,\d+ bytes .* Nothing was lost"):
        run()
    with LimitedFiles(1200):
        engine.close()
    state = engine.optimizer.state_dict()["state"]
    twin, expected = train(steps=2)
    assert_same_weights(model, twin)
    for i, values in expected.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][key]) for key, value in values.items())
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_at_the_start_leaves_the_state_to_the_optimizer(tmp_path):
    model = Net()
    optimizer = torch.optim.Adagrad(model.parameters())
    offloader = StateOffloader("cpu", "disk", directory=tmp_path)
    with LimitedFiles(400), pytest.raises(OSError, match="Nothing was lost"):
        attach_published(model, optimizer, make_offloader=lambda: offloader)
    assert all(len(optimizer.state[p]) == 2 for p in model.parameters())


def test_state_that_an_optimizer_replaces_goes_to_the_same_place(tmp_path):
    class Replacing(torch.optim.AdamW):
        def step(self, closure=None):
            result = super().step(closure)
            for state in self.state.values():
                state["exp_avg"] = state["exp_avg"].clone()
            return result

    model = Net()
    offloader = StateOffloader("cpu", "disk", directory=tmp_path)
    engine = attach_published(model, Replacing(model.parameters(), lr=0.01), make_offloader=lambda: offloader)
    for batch in tokens(30):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    assert len(list(tmp_path.rglob("*.bin"))) == 5
    expected, _ = train(steps=30)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("resumed", [False, True])
def test_nothing_stays_on_the_host_if_nothing_is_offloaded(resumed):
    make = lambda: StateOffloader("cpu", "none", device_module=LaggingDevice(), always_copy=True)  # noqa: E731
    model, engine = train(make(), weights_dtype=torch.bfloat16, master_weights="full")
    if resumed:
        saved, model = engine.optimizer.state_dict(), Net().bfloat16()
        engine = attach_published(model, adamw(model.parameters()), make_offloader=make, master_weights="full")
        engine.optimizer.load_state_dict(saved)
        for batch in tokens(5):
            next_token_loss(model, batch).backward()
            engine.optimizer.step()
    assert engine.offloader.host_bytes == 0


# --- bad input --------------------------------------------------------------------------------------------------------


def test_missing_directory(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"nowhere is no directory. Create it, or name one that exists"):
        StateOffloader("cpu", "disk", directory=tmp_path / "nowhere")


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/proc/self"), reason="needs a folder nobody can write to")
def test_unwritable_directory(tmp_path):
    directory = "/proc/self" if os.geteuid() == 0 else tmp_path
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"Cannot write to .* Name a directory that can be written to"):
        StateOffloader("cpu", "disk", directory=directory)


def test_disk_without_directory_and_directory_without_disk(tmp_path):
    with pytest.raises(ValueError, match=r"offload='disk' with no directory. offload='disk' needs a directory"):
        HiFTStrategy(offload="disk")
    with pytest.raises(ValueError, match="offload='host' with the directory"):
        HiFTStrategy(offload="host", offload_directory=str(tmp_path))


# --- before the run ---------------------------------------------------------------------------------------------------


def test_host_that_is_too_small_is_refused_with_the_sum(monkeypatch):
    monkeypatch.setattr("lightning_hift.planner.preflight.available_host_memory", lambda: 9000)
    model = Automatic()
    with pytest.raises(
        RuntimeError, match=r"needs at least 9.32 KiB on the host, which has 8.79 KiB[\s\S]*all groups +9"
    ):
        trainer(strategy="hift").fit(model, loader(2))
    assert all(p.requires_grad for p in model.parameters())


def test_masters_are_part_of_the_sum(monkeypatch):
    monkeypatch.setattr("lightning_hift.planner.preflight.available_host_memory", lambda: 9000)
    for mode, fits in {"none": True, "split": False}.items():
        run = trainer(strategy=HiFTStrategy(master_weights=mode), precision="bf16-true")
        if fits:
            run.fit(Automatic(), loader(2))
        else:
            with pytest.raises(RuntimeError, match=r"masters of all groups +2.33 KiB"):
                run.fit(Automatic(), loader(2))


def test_disk_that_is_too_small_is_refused(monkeypatch, tmp_path):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=9000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match=r"needs 9.32 KiB in .*, where 8.79 KiB are free"):
        trainer(strategy=HiFTStrategy(offload="disk", offload_directory=str(tmp_path))).fit(Automatic(), loader(2))


def test_wear_of_the_disk_is_printed(caplog, tmp_path):
    caplog.set_level("INFO")
    trainer(strategy=HiFTStrategy(offload="disk", offload_directory=str(tmp_path))).fit(Automatic(), loader(2))
    # 9544 bytes in five groups, a thousand times
    assert "optimizer state takes 9.32 KiB in" in caplog.text
    assert "1,000 steps write about 1.82 MiB" in caplog.text


def test_trainer_without_its_directory(tmp_path):
    strategy = HiFTStrategy(offload="disk", offload_directory=str(tmp_path / "no"))
    with pytest.raises(NotADirectoryError, match="Create it"):
        trainer(strategy=strategy).fit(Automatic(), loader(2))
