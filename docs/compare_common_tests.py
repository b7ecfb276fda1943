"""lmconform against transformers' own common tests, on Llama.

    python docs/compare_common_tests.py --transformers-tests DIR

DIR is the folder tests/ of transformers in the installed version. PyPI's source archive holds the mixins:

    pip download --no-deps --no-binary :all: transformers==VERSION && tar xf transformers-VERSION.tar.gz
    pip install parameterized

It leaves out the folders below tests/, and with them the tests of generation and of export; a checkout of the version's
tag has them too, and what is there runs. The class that runs the mixins on Llama is written to a temporary folder.

`time` measures whole processes in turns; `faults` plants every fault of a Llama host in every model that the common
tests build, and runs both suites on it. Both go on where docs/common_tests.json ends, and write docs/common_tests.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from fixtures.faults import Fault

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

FIGURES = HERE / "common_tests.json"
HOST = "llama"
PROFILES = ("smoke", "default")
RED = ("failed", "warned", "error")
FAULT = "LMCONFORM_PLANTED_FAULT"  # tells the tests' process what to plant; "sound" plants nothing in the same way
SOUND_RUNS = 3  # what fails in any of these without a fault tells nothing

STAND_INS = {  # where DIR lacks them: empty, so that their tests are left out and the others run
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
LLAMA = '''
import inspect
import unittest

import torch

from compare_common_tests import plant_as_asked
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

CLASSES = ["LlamaModel", "LlamaForCausalLM"]
if not plant_as_asked():  # the other heads stand on the same LlamaModel, and cost as much again
    CLASSES += ["LlamaForSequenceClassification", "LlamaForQuestionAnswering", "LlamaForTokenClassification"]


class LlamaTester:
    """The sizes of transformers' own testers of causal models."""

    is_training = True
    batch_size, seq_length = 13, 7
    num_hidden_layers, num_attention_heads, hidden_size = 2, 2, 32
    causal_lm_class = modeling_llama.LlamaForCausalLM

    def get_config(self):
        return LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, hidden_act="gelu", max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, attention_dropout=0.1,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        mask = torch.tril(torch.ones(shape, dtype=torch.long))
        return self.get_config(), {"input_ids": ids_tensor(shape, 99), "attention_mask": mask}


class TestLlama(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = None
    all_model_classes = tuple(getattr(modeling_llama, name) for name in CLASSES)

    def setUp(self):
        self.model_tester = LlamaTester()
        self.config_tester = ConfigTester(self, config_class=LlamaConfig)

    def test_config(self):
        self.config_tester.run_common_tests()


def test_planted_model_runs():
    tester = LlamaTester()
    config, inputs = tester.prepare_config_and_inputs_for_common()
    assert modeling_llama.LlamaForCausalLM(config).eval()(**inputs).logits.shape == (13, 7, 99)
'''
FITS = "tests/test_llama_common.py::test_planted_model_runs"


def plant_as_asked() -> bool:
    """Plant the fault that the environment names in every LlamaModel and LlamaForCausalLM; False where it names none.

    The classes are replaced where transformers looks them up, so what from_pretrained() and the Auto classes build has
    the fault as well. A LlamaModel that stands alone or behind another head gets it through a host made around it.
    """
    id = os.environ.get(FAULT, "")
    if not id:
        return False
    import transformers
    from measure_kills import planted
    from torch import nn
    from transformers import GenerationConfig
    from transformers.models import llama
    from transformers.models.llama import modeling_llama

    from fixtures.faults import intact

    plant = planted(f"sound.{HOST}" if id == "sound" else id).plant
    whole, base = modeling_llama.LlamaForCausalLM, modeling_llama.LlamaModel
    small = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2
    )
    made = plant(whole(small))
    if made is not None:  # the fault is in a constructor or a method of the class that it makes
        whole, base = type(made), type(made.model)
        plant = intact
    inside = False

    def construct_whole(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal inside
        inside, before = True, inside
        try:
            whole.__init__(self, *args, **kwargs)
        finally:
            inside = before
        plant(self)

    def construct_base(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        if inside:
            return
        host = whole.__new__(whole)
        nn.Module.__init__(host)
        host.config, host.generation_config = self.config, GenerationConfig.from_model_config(self.config)
        host.model = self
        host.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        plant(host)

    for name, kind, construct in (
        ("LlamaForCausalLM", whole, construct_whole),
        ("LlamaModel", base, construct_base),
    ):
        members = {"__init__": functools.wraps(kind.__init__)(construct), "__module__": modeling_llama.__name__}
        carrier = type(name, (kind,), members)
        for place in (modeling_llama, llama, transformers):
            setattr(place, name, carrier)
    return True


@contextmanager
def workplace(tests: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder with a package `tests` of transformers' mixins and the class for Llama, and what DIR lacked."""
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "tests"
        package.mkdir()
        for file in tests.iterdir():
            (package / file.name).symlink_to(file.resolve())
        missing = [path for path in STAND_INS if not (package / path).exists()]
        for path in missing:
            (package / path).parent.mkdir(exist_ok=True)
            (package / path).write_text(STAND_INS[path])
        for folder in {package, *((package / path).parent for path in missing)}:
            (folder / "__init__.py").touch()
        (package / "test_llama_common.py").write_text(LLAMA)
        yield Path(name), missing


def environment(**more: str) -> dict[str, str]:
    """The processes' variables: one thread, no network, bytecode written once as in everyday use."""
    path = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **fixed, **more}


def timed(command: list[str], folder: Path, **more: str) -> tuple[float, float, int]:
    """Wall clock, processor time of the whole process with its children, and its exit code."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.returncode


def load(folder: Path) -> None:
    """Import what every run needs: each is a fork of this process, in which importing is no part of the work."""
    for module in ("pytest", "measure_kills", "lmconform.checks"):
        importlib.import_module(module)
    sys.path.insert(0, str(folder))
    for module in ("test_modeling_common", "test_training_mixin", "test_configuration_common"):
        importlib.import_module(f"tests.{module}")


def _pytest_here(folder: Path, fault: str, arguments: list[str]) -> None:
    import pytest

    os.environ[FAULT] = fault
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os._exit(pytest.main(arguments))


def common_tests(folder: Path, ids: list[str], fault: str, *options: str) -> list[dict[str, Any]]:
    """Run these of the common tests (all, if none are named) and say how each ended."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options)
    child = get_context("fork").Process(
        target=_pytest_here, args=(folder, fault, [*options, *(ids or ["tests/test_llama_common.py"])])
    )
    child.start()
    child.join()
    if not report.exists():
        raise RuntimeError(f"pytest of the common tests died with {child.exitcode}: run it in {folder} to see why")
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        kind = str(case.get("classname")).rpartition(".")[2]
        name = f"{kind}::{case.get('name')}" if kind == "TestLlama" else case.get("name")
        how = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "" if how is None else (how.get("message") or "")
        rows.append({
            "test": f"tests/test_llama_common.py::{name}", "status": "passed" if how is None else how.tag,
            "message": message, "seconds": float(case.get("time", 0)),
            "raised_in": "" if how is None else (how.text or "").rstrip().rpartition("\n")[2],
        })  # fmt: skip
    return rows


def pytest_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]


def learn_sound(figures: dict[str, Any], folder: Path) -> None:
    """The tests that pass with nothing planted, quickest first; what ends otherwise there tells nothing of a fault."""
    runs = [common_tests(folder, [], fault) for fault in ("", *["sound"] * SOUND_RUNS)]
    plain, *sound = [{row["test"]: row for row in run} for run in runs]
    green = [id for id in plain if all(run.get(id, {}).get("status") == "passed" for run in (plain, *sound))]
    figures["suite"] = {
        "tests": len(plain) - 1,  # FITS is ours
        "skipped": sum(row["status"] == "skipped" for row in plain.values()),
        "order": sorted(green, key=lambda id: (id != FITS, sound[0][id]["seconds"])),
        "not_green": {
            id: sorted({f"{run[id]['status']}: {run[id]['message'][:200]}" for run in (plain, *sound)})
            for id in plain
            if id not in green and any(run[id]["status"] != "skipped" for run in (plain, *sound))
        },
    }


def theirs(id: str, folder: Path, order: list[str]) -> dict[str, Any]:
    """The first of the common tests that fails on the fault, and does so again when run alone.

    What is raised by the plant's own lines does not count: then it is the plant that does not know that way of calling.
    """
    started, left, excused = time.perf_counter(), order, []
    first: dict[str, Any] = {}
    while left and not first:
        red = [row for row in common_tests(folder, left, id, "-x") if row["status"] in ("failure", "error")]
        if not red:
            break
        test = red[0]["test"]
        left = left[left.index(test) + 1 :]
        if test == FITS:
            first = red[0]
        elif "fixtures/" in red[0]["raised_in"]:
            excused.append(test.rpartition("::")[2])
        elif any(row["status"] in ("failure", "error") for row in common_tests(folder, [test], id)):
            first = red[0]
    found = {"caught": bool(first) and first["test"] != FITS, "fits": first.get("test") != FITS, "excused": excused}
    told = {"test": first["test"].rpartition("::")[2], "message": first["message"][:300]} if first else {}
    return found | told | {"seconds": round(time.perf_counter() - started, 1)}


def ours(id: str) -> dict[str, Any]:
    """The checks of the default profile that are red on the fault, and those of them that belong to smoke."""
    import measure_kills
    from kill_figures import results_of

    from lmconform.registry import select_checks

    row = measure_kills.measured(id, 0, "default", {})
    red = {result.id: result.status for result in results_of(row) if result.status in RED}
    smoke, default = ([check.id for check in select_checks(profile) if check.id in red] for profile in PROFILES)
    return {"smoke": smoke, "default": default, "warned": [id for id in default if red[id] == "warned"]}


def compared() -> tuple[list[str], dict[str, str]]:
    """The faults to plant, and the other faults of the host with the reason why they are no change of a model.

    Every family of checks in turn gives one: a run that was cut short has seen some of each.
    """
    from fixtures.faults import all_faults, intact

    of_host = [fault for fault in all_faults() if fault.host == HOST]
    left_out = {}
    for fault in of_host:
        if fault.plant is intact or fault.recipe or fault.tokenizer:
            left_out[fault.id] = "in the recipe or the tokenizer handed over beside the model"
        elif fault.reference:
            left_out[fault.id] = "seen only beside a sound reference, which neither suite has on its own"
    families: dict[str, list[str]] = {}
    for fault in of_host:
        if fault.id not in left_out:
            families.setdefault(fault.kills[0].partition(".")[0], []).append(fault.id)
    in_turns = itertools.zip_longest(*families.values())
    return [id for turn in in_turns for id in turn if id], left_out


def of_generation(fault: Fault) -> bool:
    """Whether generate() alone shows it."""
    return all(check.startswith("generation.") for check in fault.kills)


def measure_faults(figures: dict[str, Any], tests: Path, minutes: float) -> None:
    """Run both suites on every fault, as far as the figures lack them; sound first."""
    ends = time.monotonic() + 60 * minutes
    with workplace(tests) as (folder, missing):
        figures["missing"] = missing
        load(folder)
        if "suite" not in figures:
            learn_sound(figures, folder)
            write(figures)
        rows = figures.setdefault("faults", {})
        for id in [f"sound.{HOST}", *compared()[0]]:
            found = rows.get(id, {})
            wanted = {"ours"} if id.startswith("sound.") else {"ours", "theirs"}
            if wanted <= found.keys() or time.monotonic() > ends:
                continue
            if "ours" not in found:
                with get_context("fork").Pool(1) as pool:  # what a fault does to its process ends with it
                    found["ours"] = pool.apply(ours, (id,))
            if "theirs" in wanted - found.keys():
                found["theirs"] = theirs(id, folder, figures["suite"]["order"])
            rows[id] = found
            write(figures)
            print(id, found, flush=True)


def commands(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """What is timed: each a command and the folder it runs in."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    found = {}
    for workers in ("0", "2"):
        tests = [*pytest_command("-n", workers), "tests/test_llama_common.py", "--deselect", FITS]
        found[f"common tests, pytest -n {workers}"] = (tests, folder)
    for profile in PROFILES:
        check = [sys.executable, "-m", "lmconform", "check", f"transformers:{HOST}", "--profile", profile]
        found[f"lmconform check, {profile}"] = (check, empty)
        for workers in ("0", "2"):
            items = pytest_command("-n", workers, "--lm", f"transformers:{HOST}", "--lm-profile", profile)
            found[f"lmconform {profile}, pytest -n {workers}"] = (items, empty)
    return found


def measure_times(figures: dict[str, Any], tests: Path, rounds: int, minutes: float) -> None:
    """Whole processes in turns, to and fro, until there are so many rounds; a round that was cut short is completed."""
    from lmconform.bench.machine import facts

    ends = time.monotonic() + 60 * minutes
    figures["machine"] = facts()
    with workplace(tests) as (folder, figures["missing"]):
        times = figures.setdefault("times", {})
        for number in range(rounds):
            for name, (command, where) in list(commands(folder).items())[:: -1 if number % 2 else 1]:
                done = times.setdefault(name, [])
                if len(done) > number or time.monotonic() > ends:
                    continue
                wall, processor, code = timed(command, where)
                if code:
                    raise RuntimeError(f"{' '.join(command)} ended with {code}")
                done.append([wall, processor, round(os.getloadavg()[0], 1)])
                write(figures)
                print(f"{name}: {wall:.1f} s, {processor:.1f} s of the processor", flush=True)


def read() -> dict[str, Any]:
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def write(figures: dict[str, Any]) -> None:
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", help="time, faults or page; all three, if none is named")
    parser.add_argument("--transformers-tests", type=Path, metavar="DIR", help="tests/ of transformers' sources")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing further after so long")
    args = parser.parse_args()
    if unknown := set(args.what) - {"time", "faults", "page"}:
        parser.error(f"time, faults or page, not {', '.join(sorted(unknown))}")
    what = args.what or ["time", "faults", "page"]
    if args.transformers_tests is None and what != ["page"]:
        parser.error("--transformers-tests DIR is missing: tests/ of transformers' sources, see the head of this file")
    os.environ.update(environment())
    figures = read()
    if "faults" in what:
        measure_faults(figures, args.transformers_tests, args.minutes)
    if "time" in what:
        measure_times(figures, args.transformers_tests, args.rounds, args.minutes)
    if "page" in what:
        from common_tests_page import page

        (HERE / "common_tests.md").write_text(page(figures, compared()[1]), encoding="utf-8")


if __name__ == "__main__":
    main()
