"""`python -m models` on the story system: recipes, tokenizers, what is trained is saved and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures.subjects.story import stories
from models.story import StoryForCausalLM
from models.story.system import SIZES, SYSTEM
from models.training.cli import load, main
from models.training.evaluation import generate
from models.training.recipe import default_arguments
from models.training.systems import training_options

pytestmark = pytest.mark.story

QUICK = ["--max-steps", "4", "--max-length", "16", "--batch-size", "2", "--eval-samples", "8", "--quiet", "--cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments: words in the first phase, characters in the second."""
    place = tmp_path_factory.mktemp("story")
    (place / "stories.txt").write_text("\n".join(stories(80)))
    given = ["--datasets", str(place / "stories.txt"), "--output-dir", str(place / "experiments"), *QUICK]
    assert main(["train", "story", *given]) == 0
    second = ["--phase", "2", "--tokenizer", "character", "--vocab-size", "80", "--norm-placement", "post"]
    assert main(["train", "story", *given, *second, "--experiment-name", "second"]) == 0
    return place


def results(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "experiments" / name / "results.json").read_text())
    return found


@pytest.mark.parametrize("name", ["story", "second"])
def test_a_checkpoint_is_an_ordinary_one(name: str, folder: Path) -> None:
    final = folder / "experiments" / name / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert isinstance(model, StoryForCausalLM)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.norm_placement == ("post" if name == "second" else "pre")
    assert tokenizer.tokenize("cat") == (["c", "a", "t"] if name == "second" else ["cat"])


def test_phases_are_defaults_of_the_shared_options(folder: Path) -> None:
    one, two = (results(folder, name)["options"] for name in ("story", "second"))
    assert (one["learning_rate"], one["warmup_steps"], one["label_smoothing"]) == (1e-3, 0.05, 0)
    assert (two["label_smoothing"], two["accumulation"], two["lr_scheduler"]) == (0.1, 2, "cosine")


@pytest.mark.parametrize(("phase", "ends_at"), [("1", 1.0), ("2", 0.0)])
def test_the_rate_rises_by_steps_and_then_stays_or_falls(phase: str, ends_at: float) -> None:
    import torch
    from transformers import Trainer

    arguments = default_arguments(SYSTEM, "--phase", phase, steps=200)
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(200)
    factors = []
    for _ in range(200):
        factors.append(trainer.optimizer.param_groups[0]["lr"] / 1e-3)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert factors[-1] == pytest.approx(ends_at, abs=1e-3)
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.999 if phase == "1" else 0.98)


def test_a_constant_rate_warms_up_where_it_is_told_to() -> None:
    """transformers' "constant" ignores warmup_steps."""
    arguments = default_arguments(SYSTEM, "--lr-scheduler", "constant", "--warmup-steps", "20", steps=100)
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    assert arguments.get_warmup_steps(100) == 20


@pytest.mark.parametrize(("text", "says"), [("1.5", "neither a whole number of steps nor a share"), ("-1", "not from")])
def test_warmup_is_a_number_of_steps_or_a_share(text: str, says: str, capsys: Any) -> None:
    assert main(["train", "story", "--datasets", "none", f"--warmup-steps={text}"]) == 2
    assert says in capsys.readouterr().err


def test_a_system_names_its_own_experiment(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    written = []
    for seed in ("1", "1", "2"):
        sampling = ["--temperature", "1.2", "--top-k", "30", "--top-p", "0.95", "--repetition-penalty", "1.1"]
        assert main(["generate", "story", "--prompt", "once the", *sampling, "--seed", seed]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]


def test_what_is_written_goes_on_behind_the_prompt(folder: Path) -> None:
    """Words are parted by spaces in decoding only: the prompt's last one and the first new one, too."""
    import torch

    model, tokenizer = load(str(folder / "experiments" / "story" / "final"))
    greedy = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": tokenizer.all_special_ids}
    written = generate(model, tokenizer, ["once the"], **greedy)[0]
    ids = torch.tensor([tokenizer("once the")["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    assert tokenizer("once the" + written)["input_ids"] == made[0].tolist()


def test_a_system_without_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "story", "--prompt", "once"]) == 2
    assert "train one (python -m models train story" in capsys.readouterr().err


def test_sweep_is_the_instruments(tmp_path: Path, capsys: Any) -> None:
    figures = tmp_path / "rates.json"
    code = main(["sweep", "story", "--rates", "1e-6,1e-2", "--seeds", "1", "--steps", "8", "--json", str(figures)])
    assert code in (0, 1)
    assert [row["rate"] for row in json.loads(figures.read_text())["rows"]] == [1e-6, 1e-2]


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str) -> None:
    args = training_options(SYSTEM, ["--datasets", "none", "--size", size])
    model = SYSTEM.build(args, range(2000 if size != "tiny" else 1024))  # of a tokenizer it asks the length
    count = sum(parameter.numel() for parameter in model.parameters())
    assert {"tiny": count < 100_000, "small": 1e6 < count < 5e6, "report": round(count / 1e6, 2) == 4.18}[size]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention": "both"}, """attention is "causal" or "bidirectional", not 'both'"""),
        ({"norm_placement": "middle"}, """norm_placement is "pre" or "post", not 'middle'"""),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of 5 heads"),
    ],
    ids=["attention", "norm", "heads"],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], says: str) -> None:
    from huggingface_hub.errors import StrictDataclassError

    from models.story.system import tiny

    with pytest.raises(StrictDataclassError, match=re.escape(says)):
        tiny(**fields)


def test_a_width_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--datasets", str(folder / "stories.txt"), "--output-dir", str(tmp_path / "out"), *QUICK, "--width", "30"]
    assert main(["train", "story", *given]) == 2
    assert "--width 30: hidden_size 30 is no multiple of 4 heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "stopped"])
def test_a_run_that_diverges_says_so(stop: bool, folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--datasets", str(folder / "stories.txt"), "--output-dir", str(tmp_path), *QUICK, "--logging-steps", "1"]
    wild = ["--max-steps", "12", "--learning-rate", "1e30", "--max-grad-norm", "0", "--warmup-steps", "0"]
    assert main(["train", "story", *given, *wild, *(["--stop-on-alert"] if stop else [])]) == 1
    shown = capsys.readouterr()
    assert "the run diverged" in shown.err
    assert ("stopped by an alert at step" in shown.out) == stop
    found = json.loads((tmp_path / "story" / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["diverged"]
    assert (found["steps"] < found["planned_steps"]) == stop


def test_help_shows_the_defaults_that_hold(capsys: Any) -> None:
    assert main(["train", "story", "--phase", "2", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    args = training_options(SYSTEM, ["--datasets", "none", "--phase", "2"])
    assert f"peak rate (default {args.learning_rate:g})" in shown
    assert f"tokens of an example (default {args.max_length})" in shown
    assert "--text-unit {line,story} what is one text in a .txt file: a line, or a story" in shown
    assert f"paragraphs (default {args.text_unit})" in shown
    assert f"micro-batches of an optimizer step (default {args.accumulation})" in shown


@pytest.mark.parametrize("command", ["diagnose", "sweep"])
def test_a_folder_that_is_no_checkpoint(command: str, folder: Path, capsys: Any) -> None:
    assert main([command, str(folder)]) == 2
    assert "no checkpoint of a known kind" in (said := capsys.readouterr().err)
    assert "did you mean" not in said
    assert main([command, str(folder / "experiments" / "story")]) == 2
    assert f"did you mean {folder / 'experiments' / 'story' / 'final'}?" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--text", "tales.txt"], ["--text=tales.txt"]], ids=["apart", "joined"])
def test_a_sweep_finds_its_text_as_the_other_commands_do(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmconform.cli

    passed: list[list[str]] = []
    monkeypatch.setattr(lmconform.cli, "main", lambda arguments: passed.append(arguments) or 0)
    monkeypatch.setenv("LMCONFORM_DATA", str(tmp_path))
    (tmp_path / "tales.txt").write_text("One.\n")
    assert main(["sweep", "story", "--rates", "1e-3,1e-2", *given]) == 0
    assert passed[0][-2:] == ["--text", str(tmp_path / "tales.txt")]
    assert {"--rates", "1e-3,1e-2"} <= set(passed[0])


def test_a_tokenizer_beside_a_base_is_refused(folder: Path, capsys: Any) -> None:
    base = str(folder / "experiments" / "story" / "final")
    given = ["--datasets", str(folder / "stories.txt"), "--model", base, "--tokenizer", "word"]
    assert main(["train", "story", *given]) == 2
    assert "brings its own" in capsys.readouterr().err
