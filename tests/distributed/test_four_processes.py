"""Four processes: the basic cases, as with two."""

import pytest

from tests.distributed.test_ddp import assert_close
from tests.engine.test_state_partition import adamw, assert_equal, fit, momentum
from tests.processes import succeeded

CLIPPED = {"make": momentum, "accumulate_grad_batches": 3, "gradient_clip_val": 0.05}


def run_fit(world, partition_state, options):
    return fit(partition_state, world, **options)


@pytest.mark.parametrize("options", [{"make": momentum}, CLIPPED], ids=["automatic", "accumulated_and_clipped"])
def test_equals_one_process_on_the_joined_batch(options, four):
    found = succeeded(four.run(run_fit, 4, False, options))
    expected, *_ = fit(world=1, **options)
    assert_close(found[0][0], expected)
    for weights, *_ in found[1:]:
        assert_equal(weights, found[0][0])


@pytest.mark.parametrize(
    "options",
    [{"make": adamw}, CLIPPED, {"precision": "bf16-true", "gradient_clip_val": 0.05}],
    ids=["adamw", "accumulated_and_clipped", "bf16_masters"],
)
def test_divided_state_equals_undivided_state(options, four):
    divided = succeeded(four.run(run_fit, 4, True, options))
    expected = succeeded(four.run(run_fit, 4, False, options))
    for (found, reports, *_), (weights, *_) in zip(divided, expected, strict=True):
        assert_equal(found, weights)
        assert reports[0].complete
    everything, *_ = expected[0][2]
    parts = [host_bytes for *_, (host_bytes,), _ in divided]
    assert sum(parts) == everything
    assert max(parts) < everything / 2


def test_four_processes_save_and_two_go_on(four, two, tmp_path):
    options = {"make": momentum, "default_root_dir": str(tmp_path)}
    whole = succeeded(four.run(run_fit, 4, True, options))
    succeeded(four.run(run_fit, 4, True, {**options, "steps": 7, "path": tmp_path / "7.ckpt"}))
    resumed = {**options, "resumed": tmp_path / "7.ckpt"}
    for weights, *_ in succeeded(four.run(run_fit, 4, True, resumed)):
        assert_equal(weights, whole[0][0])
    divided = succeeded(two.run(run_fit, 2, True, resumed))
    undivided = succeeded(two.run(run_fit, 2, False, resumed))
    for (found, *_), (expected, *_) in zip(divided, undivided, strict=True):
        assert_equal(found, expected)
        assert_close(found, whole[0][0])
