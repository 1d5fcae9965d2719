"""Why tests of Lightning do not pass with HiFT. What no rule explains counts as a fault."""

import re

CLASSES = {
    "a": "a fault, or not explained yet",
    "b": "by design: refused with a message that says why and what to do, or said in the README",
    "c": "refused with a wrong or unclear message",
    "d": "the test looks at what is other by nature: mocks, names of classes, counts of calls, lists of callbacks",
}
# By class and reason: patterns of the variant and the test's id, and of the error.
REASONS = {
    ("b", "several optimizers hold the same parameters"): ("", "More than one optimizer holds"),
    ("b", "trainable parameters that no optimizer holds"): ("", "No optimizer holds"),
    ("b", "LBFGS, which steps on all parameters at once"): ("", "LBFGS cannot train"),
    ("b", "no optimizer"): ("", "configure_optimizers returned no optimizer"),
    ("b", "`BaseFinetuning`, which adds parameters later"): (
        "",
        "freezes layers and adds|Did you init your optimizer|BaseFinetuning",
    ),
    ("b", "a layer that the loss never reaches"): (
        "eval_mode_warning|load_more_params|test_sparsity_calculation|applies_lr_after_restore",
        "no gradient|never had a gradient",
    ),
    ("b", "weights are made in 32 bits, for their masters"): ("test_half.py::test_configure_model", "float32"),
    ("b", "the learning rate is held in a sweep, that of `SWALR`, too"): ("^rotate: .*test_swa_", "_step_count"),
    ("b", "the training loader is made earlier, to know the length of the run, and draws its data then"): (
        "^default: .*(hook_system|load_only_once|overfit_batches_same|calls_gives_same|linear_mode|no_need_configure)",
        "^(Assertion|Type)Error|^assert|dataloader",
    ),
    ("b", "a `LearningRateFinder` in mid-run with the callback alone"): ("", "Or a LearningRateFinder, which takes"),
    ("b", "an ordinary loader goes on in mid-epoch, and an interrupted validation runs as a whole"): (
        "fail_during_validation|mid_epoch|save_and_restore_dataloaders",
        "DID NOT WARN|did not match|^Assertion",
    ),
    ("d", "names of Lightning's loops in profiles and call stacks"): (
        "test_fetching_is_profiled|test_auto_restart_under_signal",
        "_TrainingEpochLoop|_FitLoop",
    ),
    ("d", "`backward` is a mock or does nothing"): (
        "backward_count|TroubledModelBackward",
        "no gradient|never had a gradient|depends on no parameter",
    ),
    ("d", "the `step` of a scheduler is a mock"): ("scheduler", "call.__eq__|MagicMock name='step'|Called . times"),
    ("d", "a class of Lightning is mocked, and ours is another one"): ("storage_options", "expected call not found"),
    ("d", "the name of Lightning's strategy in profiles"): ("test_pytorch_profiler_trainer_fit", "where 0 = sum"),
    ("d", "the list of callbacks"): ("hook_multiple_calls|reset_correctly", "HiFTCallback"),
    ("d", "calls are counted, with those of a throw-away optimizer"): ("test_train_loop_system", "'step', 'ste"),
    ("d", "a layer whose turn it is not has no gradient, is frozen, and stays as it is"): (
        "^(default|rotate): .*(clipping|double_precision|mode_restored|accumulation_window|test_full_loop"
        "|optimizer_closure|scheduling_last_batch|test_disabled_training)",
        "'NoneType' object has no attribute|assert (not|False)|> 0.6",
    ),
    ("d", "devices are mocked, and the harness asks for one"): ("test_connector_auto_selection", "on one device"),
}


def explain(test, error):
    """Class and reason, by the first rule whose patterns are found."""
    found = (why for why, (where, what) in REASONS.items() if re.search(where, test) and re.search(what, error))
    return next(found, ("a", "not explained"))
