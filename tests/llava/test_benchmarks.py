"""The paper's columns as lmms-eval tasks, and what becomes of lmms-eval's results. Needs no lmms-eval."""

import importlib.util
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from llava.eval import benchmarks
from llava.eval.benchmarks import scores_of, tasks_of
from tests.scripts.launching import ROOT, run_script

# Typed from the paper's columns and DECISIONS' names of tasks.
TAB1 = ["chartqa", "docvqa_val", "ai2d", "inst_it", "gqa", "mmmu_val", "mmbench_en_dev_static", "realworldqa"]
TAB2 = ["ok_vqa_val2014", "textvqa_val", "docvqa_val", "infovqa_val", "chartqa", "seedbench", "mme"]


def test_the_tasks_of_the_paper_s_tables():
    assert tasks_of(["tab1"]) == TAB1
    assert tasks_of(["tab2"]) == TAB2
    assert tasks_of(["tab1", "tab2", "docvqa", "some_task"]) == list(dict.fromkeys([*TAB1, *TAB2, "some_task"]))


def test_results_become_the_paper_s_numbers():
    results = {
        "chartqa": {"alias": "chartqa", "relaxed_overall,none": 0.667, "relaxed_overall_stderr,none": 0.01},
        "mmbench_en_dev_static": {"gpt_eval_score,none": 56.4, "submission,none": "N/A"},
        "mme": {"mme_perception_score,none": 1543.2, "mme_cognition_score,none": 300.0},
        "ai2d": {"exact_match,flexible-extract": 0.619},
    }
    scores = scores_of(results)
    assert scores == {
        "chartqa": 66.7, "mmbench": 56.4, "mme": 1543.2, "mme/mme_cognition_score": 300.0, "ai2d": 61.9,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A folder as one run of lmms-eval leaves it."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    content = {"results": {"gqa": {"exact_match,none": 0.5}}, "config": {"model_args": "pretrained=m"}}
    content |= {"configs": {"gqa": {"tag": ["qa"]}}}
    (folder / "model/1_results.json").write_text(json.dumps(content))
    return folder


def test_results_become_a_measurement(results, tmp_path):
    flags = ["--results", str(results), "--output", str(tmp_path / "scores.json"), "--label", "mine"]
    flags += ["--tasks", "gqa", "qa", "--model-args", "pretrained=m"]
    benchmarks.main([*flags, "--row", "tab1/comp_1b_siglip", "--command", "A=1 bash x -- --limit 3"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert (found["label"], found["rows"]) == ("mine", ["tab1/comp_1b_siglip"])
    assert (found["scores"], found["command"]) == ({"gqa": 50.0}, "A=1 bash x -- --limit 3")


def test_a_failed_run_another_model_and_a_missing_task_are_no_measurement(results, tmp_path):
    """lmms-eval exits with 0 after an exception."""
    output = ["--output", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match=r"holds 0 \*results.json"):
        benchmarks.main(["--results", str(tmp_path / "nothing"), *output])
    with pytest.raises(SystemExit, match="are of --model_args pretrained=m, expected pretrained=other"):
        benchmarks.main(["--results", str(results), *output, "--model-args", "pretrained=other"])
    with pytest.raises(SystemExit, match="no result for --tasks docvqa_val:"):
        benchmarks.main(["--results", str(results), *output, "--tasks", "docvqa", "gqa"])
    (results / "2_results.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds 2 \*results.json"):
        benchmarks.main(["--results", str(results), *output])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("asked", "same"),
    [("pretrained=m,max_num_vistoken=64", True), ("pretrained=n,max_num_vistoken=64", False), ("pretrained=m", False)],
)
def test_model_arguments_are_compared_as_far_as_lmms_eval_shows_them(asked, same):
    assert benchmarks.same_arguments(asked, "pretrained=m,max_num_vistoken=[REDACTED]") == same


def evaluation(*words, **environment) -> list[str]:
    done = run_script("eval", *words, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_the_script_s_command_on_gpus_and_without():
    command = evaluation("runs/x/stage3_sft", NUM_GPUS="8", MODEL_ARGS="max_num_vistoken=4000")
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[command.index("--num_processes") + 1] == "8"
    assert "--multi_gpu" in command
    assert command[command.index("--tasks") + 1] == ",".join(TAB1)
    assert command[command.index("--model_args") + 1] == "pretrained=runs/x/stage3_sft,max_num_vistoken=4000"
    command = evaluation("m", "tab2", "--", "--limit", "5", NUM_GPUS="0", BATCH_SIZE="2", RESULTS="out")
    assert command[command.index("--tasks") + 1] == ",".join(TAB2)
    assert {"--cpu", "--limit"} <= set(command)
    folders = [command[command.index("--output_path") + 1], evaluation("m", RESULTS="out", NUM_GPUS="0")[-3]]
    assert all(folder.startswith("out/lmms_eval/") for folder in folders)
    assert folders[0] != folders[1]  # no run finds the results of another
    assert command[command.index("--batch_size") + 1] == "2"


def test_a_script_without_a_model_says_so():
    done = run_script("eval", DRY_RUN="1", NUM_GPUS="0")
    assert done.returncode != 0
    assert "MODEL is missing" in done.stderr


@pytest.fixture(scope="module")
def inst_it():
    spec = importlib.util.spec_from_file_location("inst_it", ROOT / "llava/eval/lmms_tasks/inst_it/utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(C) a dog", "C"), ("The best answer is: D.", "D"), ("A cat, so B", "A"), ("none", None), ("", None)],
)
def test_the_letter_of_an_answer(inst_it, answer, letter):
    assert inst_it.chosen_letter(answer) == letter


def test_inst_it_counts_answers_that_name_a_letter(inst_it):
    results = [inst_it.process_results({"answer": "B"}, [said])["inst_it_accuracy"] for said in ("B", "b?", "C.", "B.")]
    assert inst_it.accuracy(results) == pytest.approx(2 / 3)
    assert inst_it.accuracy(results[1:2]) == 0.0
    unanswered = inst_it.process_results({"answer": "B"}, [""])["inst_it_accuracy"]
    assert inst_it.accuracy([results[0], unanswered]) == 0.5


def test_inst_it_asks_with_all_choices(inst_it):
    doc = {"question": "Who?", "choice_a": "[1]", "choice_b": "[2]", "choice_c": "[3]", "choice_d": "[4]"}
    text = inst_it.doc_to_text(doc, {"pre_prompt": "Look.", "post_prompt": "Say:"})
    assert text == "Look.\nWho?\nA. [1]\nB. [2]\nC. [3]\nD. [4]\nSay:"


def test_the_installer_pins_what_the_plug_in_was_tested_with():
    script = (ROOT / "scripts/install_lmms_eval.sh").read_text()
    assert "\nLMMS_EVAL=0.7.3\n" in script
    done = subprocess.run(["bash", "-n", str(ROOT / "scripts/install_lmms_eval.sh")], check=False, timeout=60)
    assert done.returncode == 0
    assert Path(ROOT / "llava/eval/lmms_tasks/inst_it/inst_it.yaml").is_file()
