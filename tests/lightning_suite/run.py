"""Runs Lightning's own tests with HiFT switched in, in four ways, and writes a table of what came of it.

``python -m tests.lightning_suite.run REPORT [VARIANT ...]`` takes the tests from ``LIGHTNING_TESTS``, a checkout of
Lightning's repository (or an archive of ``tests``, ``pyproject.toml`` and ``src/version.info``), else from a clone at
the tag of the installed version. With variants named, only these run again; ``none`` writes the table anew.
"""

import collections
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import lightning
import torch

import lightning_hift
from tests.lightning_suite.reasons import CLASSES, explain

HERE = Path(".lightning_suite").absolute()
VARIANTS = {
    "plain": "Lightning alone",
    "strategy": '`Trainer(strategy="hift")` wherever a test leaves the strategy to Lightning, all layers in one group',
    "callback": "`HiFTCallback` among the callbacks, all layers in one group",
    "default": "as `strategy`, with the default groups and turns",
    "rotate": "as `strategy`, each parameter a group of its own, another one at each step",
}
SUITES = """
callbacks checkpointing core loggers loops models plugins profilers trainer tuner utilities test_cli.py
strategies/test_common.py strategies/test_custom_strategy.py strategies/test_single_device.py
"""
# Several processes, downloads, or half a minute each.
LEFT_OUT = """
ddp or spawn or fork or legacy or distributed or sync_dist_true or replace_distributed_sampler or test_imports
or fit_test_synchronization or spike_detection_integration or persistent_workers_performance or double_iter
"""


def find_tests():
    """The root of a checkout of Lightning."""
    if "LIGHTNING_TESTS" in os.environ:
        return Path(os.environ["LIGHTNING_TESTS"]).absolute()
    root = HERE / lightning.__version__
    if not root.exists():
        url = "https://github.com/Lightning-AI/pytorch-lightning"
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", lightning.__version__, url, str(root)]
        if subprocess.run(command).returncode:
            sys.exit(f"Could not clone {url}. Set LIGHTNING_TESTS to a checkout of it.")
    return root


def read(variant):
    """What became of each test."""
    path = HERE / f"{variant}.jsonl"
    return {r["test"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def choose(variant):
    """Tests that pass without HiFT; for the variants in which numbers may differ, those in which it trains."""
    passed = [name for name, record in read("plain").items() if record["outcome"] == "passed"]
    trained = {name for name, record in read("strategy").items() if record["groups"]}
    return [name for name in passed if variant in ("strategy", "callback") or name in trained]


def run(variant, root):
    """All suites in one process."""
    results, only = HERE / f"{variant}.jsonl", HERE / "only.txt"
    results.unlink(missing_ok=True)
    own = {"HIFT_VARIANT": variant, "HIFT_RESULTS": str(results), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if variant != "plain":
        only.write_text("\n".join(choose(variant)))
        own["HIFT_ONLY"] = str(only)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    options = ["-p", "tests.lightning_suite.switch_in", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-c", str(root / "pyproject.toml"), "--rootdir", str(root / "tests"), "-o", "addopts="]
    options += ["--quiet", "--tb=no", "--disable-warnings", "-k", f"not ({' '.join(LEFT_OUT.split())})"]
    suites = [path for suite in SUITES.split() if (root / "tests" / (path := f"tests_pytorch/{suite}")).exists()]
    command = [sys.executable, "-m", "pytest", *options, *suites]
    with open(HERE / f"{variant}.log", "w") as log:
        subprocess.run(command, cwd=root / "tests", env={**os.environ, **own, "PYTHONPATH": paths}, stdout=log)
    print(variant, (HERE / f"{variant}.log").read_text().splitlines()[-1], flush=True)


def table(header, rows):
    """In Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def counts_of(variant, records, reasons):
    """A row of the first table."""
    classes = collections.Counter(kind for kind, _ in reasons.values())
    groups = [record["groups"] for record in records.values()]
    passed = len(records) - len(reasons)
    ran = [len(records), sum(map(bool, groups)), sum(n > 1 for n in groups), passed]
    return [variant, *ran, *(classes[kind] for kind in CLASSES), f"{passed / (len(records) - classes['d']):.1%}"]


def suite_of(name):
    """The folder of a test below ``tests_pytorch``, or the file."""
    return name.split("/")[1].split("::")[0]


def share(suite, records, reasons):
    """How many tests of a suite pass."""
    names = [name for name in records if suite_of(name) == suite]
    return f"{sum(name not in reasons for name in names)} of {len(names)}"


def report(root):
    """The whole text, and the tests that are explained by nothing."""
    results = {variant: records for variant in VARIANTS if variant != "plain" and (records := read(variant))}
    reasons = {
        variant: {
            name: explain(f"{variant}: {name}", record.get("error", record["outcome"]))
            for name, record in records.items()
            if record["outcome"] != "passed"
        }
        for variant, records in results.items()
    }
    suites = sorted({suite_of(name) for records in results.values() for name in records})
    found = sorted({reason for each in reasons.values() for reason in each.values()})
    unexplained = [f"{v}: {n}" for v, each in reasons.items() for n, (kind, _) in each.items() if kind == "a"]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    tag = (root / "src" / "version.info").read_text().strip()
    header = ["variant", "tests", "HiFT trains", "in several groups", "pass", *CLASSES, "pass, d left out"]
    parts = [
        "# Lightning's own tests with HiFT switched in",
        f"The tests of Lightning {tag} that pass without HiFT, on lightning {lightning.__version__}, torch"
        f" {torch.__version__}, lightning-hift {lightning_hift.__version__} at commit {commit}, {date.today()}. Written"
        " by `make test-lightning`.",
        table(header, [counts_of(v, results[v], reasons[v]) for v in results]),
        "\n".join(f"- `{name}`: {VARIANTS[name]}." for name in results),
        "\n".join(f"- {kind}: {meaning}." for kind, meaning in CLASSES.items()),
        "With one group everything must equal full fine-tuning. `default` and `rotate` take the tests in which HiFT"
        " trains; there numbers may differ, but nothing may crash. Values under `hift/` are not logged here, as many"
        " tests compare all that is. Tests of several processes, and of packages that are not installed, are left out.",
        "## By suite",
        table(["suite", *results], [[s, *(share(s, results[v], reasons[v]) for v in results)] for s in suites]),
        "## Why the others do not pass",
        table(
            ["class", "reason", *results],
            [[*reason, *(list(each.values()).count(reason) for each in reasons.values())] for reason in found],
        ),
        *["\n".join(f"- {each}" for each in unexplained)] * bool(unexplained),
    ]
    return "\n\n".join(parts) + "\n", unexplained


def main():
    output, *variants = sys.argv[1:]
    root = find_tests()
    HERE.mkdir(exist_ok=True)
    for variant in variants or VARIANTS:
        if variant in VARIANTS:
            run(variant, root)
    text, unexplained = report(root)
    Path(output).write_text(text)
    print(text)
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
