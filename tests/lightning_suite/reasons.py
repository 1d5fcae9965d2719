"""Why tests of Lightning do not pass with HiFT, by the test and its error. What no rule explains counts as a fault."""

import re
from typing import NamedTuple

CLASSES = {
    "a": "a fault, or not explained yet",
    "b": "by design: refused with a message that says why and what to do, or said in the README",
    "c": "refused with a wrong or unclear message",
    "d": "the test looks at what is other by nature: mocks, names of classes, counts of calls, lists of callbacks",
}


_EARLIER = "the training loader is made earlier, to know the length of the run, and draws its data then"


class Reason(NamedTuple):
    """A class, what is told, and the patterns of a test's id and of its error."""

    kind: str
    why: str
    test: str = ""
    error: str = ""


REASONS = [
    Reason("b", "several optimizers hold the same parameters", error="More than one optimizer holds"),
    Reason("b", "trainable parameters that no optimizer holds", error="No optimizer holds"),
    Reason("b", "LBFGS, which steps on all parameters at once", error="LBFGS cannot train"),
    Reason("b", "no optimizer", error="configure_optimizers returned no optimizer"),
    Reason("b", "`BaseFinetuning`, which adds parameters later", error="freezes layers and adds them"),
    Reason(
        "b", "`BaseFinetuning`, which adds parameters later", "finetuning_callback_warning|callbacks_restore_backbone"
    ),
    Reason("b", "weights are made in 32 bits, for their masters", "test_half.py::test_configure_model"),
    Reason("b", _EARLIER, "test_hooks.py.*hook_system|load_only_once|overfit_batches_same_batch"),
    Reason("b", _EARLIER, "lr_find_calls_gives_same|linear_mode_gradient"),
    Reason("d", "gradients of layers whose turn it is not", "clipping", "'NoneType' object has no attribute 'detach'"),
    Reason("d", "`backward` is a mock or does nothing", "backward_count|TroubledModelBackward"),
    Reason("d", "a scheduler's `step` is a mock", "scheduler_step_hook|scheduler_strict|step_not_called"),
    Reason("d", "a class of Lightning is mocked, of which the strategy has its own", "checkpoint_storage_options"),
    Reason("d", "the name of Lightning's strategy in profiles", "test_pytorch_profiler_trainer_fit"),
    Reason("d", "the list of callbacks", "configure_callbacks_hook_multiple_calls|test_trainer_reset_correctly"),
    Reason("d", "calls are counted, with those of a throw-away optimizer", "test_train_loop_system"),
    Reason("d", "devices are mocked, and the harness asks for one", "test_connector_auto_selection"),
]


def explain(test, error):
    """Class and reason, of the first rule whose patterns are found."""
    return next(
        (r[:2] for r in REASONS if re.search(r.test, test) and re.search(r.error, error)), ("a", "not explained")
    )
