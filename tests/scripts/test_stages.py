"""The life of a stage: started, finished, skipped, refused, trained again; what is missing is made or named."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from comp_patches.word_prior import load_counts
from llava.train.output_folder import locked
from playground.make_data import HELDOUT_IMAGES, TRAIN_IMAGES, VERSION
from tests.scripts.launching import ROOT, STAGES, FakeCluster, clean_environment, dry_run, flag, run_script


@pytest.fixture
def cluster(tmp_path):
    return FakeCluster(tmp_path)


def finish(cluster, *stages):
    for stage in stages:
        done = cluster.start(stage)
        assert done.returncode == 0, done.stderr
    cluster.launch_log.unlink()


def test_torchrun_receives_exactly_what_dry_run_prints(cluster):
    places = {"OUTPUT_ROOT": str(cluster.runs), "DATA_ROOT": str(cluster.data), "PRESET": cluster.preset}
    printed = dry_run("train_all", "--run_name", "a b", NUM_GPUS="8", **places)
    assert cluster.start("train_all", "--run_name", "a b").returncode == 0
    assert cluster.launches() == printed
    assert len(printed) == len(STAGES)


def test_a_finished_stage_is_skipped_with_one_line(cluster):
    finish(cluster, "stage1")
    again = cluster.start("stage1")
    assert again.returncode == 0
    assert cluster.launches() == []
    assert again.stderr.count("\n") == 1
    assert "stage1: finished already" in again.stderr
    record = json.loads((cluster.run / "stage1/finished.json").read_text())
    assert (record["preset"], record["stage"]) == ("comp_1b_siglip", "stage1")


def test_changed_arguments_are_refused_and_said(cluster):
    finish(cluster, "stage1")
    changed = cluster.start("stage1", "--learning_rate=2e-3")
    assert changed.returncode == 1
    assert "was: --learning_rate 1e-3\n" in changed.stderr
    assert "now: --learning_rate 2e-3\n" in changed.stderr
    assert "FRESH=1" in changed.stderr
    assert cluster.launches() == []


def test_a_run_may_go_on_with_other_hardware_and_logging(cluster):
    finish(cluster, "stage1")
    again = cluster.start("stage1", "--logging_steps", "7", "--deepspeed", "scripts/zero2.json", PER_DEVICE_BATCH="4")
    assert "finished already" in again.stderr
    assert "finished already" in cluster.start("stage1", "--allow_changed_data", "True").stderr


def test_fresh_deletes_and_trains_again(cluster):
    finish(cluster, "stage1")
    (cluster.run / "stage1/old_weights").touch()
    fresh = cluster.start("stage1", "--learning_rate", "2e-3", FRESH="1")
    assert fresh.returncode == 0, fresh.stderr
    assert cluster.trained() == ["stage1"]
    assert not (cluster.run / "stage1/old_weights").exists()
    assert "finished already" in cluster.start("stage1", "--learning_rate", "2e-3").stderr


def test_fresh_spares_a_folder_that_no_stage_made(cluster):
    (cluster.run / "stage1").mkdir()
    (cluster.run / "stage1/thesis.tex").touch()
    assert "did not make" in cluster.start("stage1", FRESH="1").stderr
    assert (cluster.run / "stage1/thesis.tex").exists()


def test_a_stage_notices_that_its_predecessor_was_trained_again(cluster):
    finish(cluster, "stage1", "stage2_fixed")
    time.sleep(1.1)  # the record has whole seconds
    assert cluster.start("stage1", FRESH="1").returncode == 0
    stale = cluster.start("stage2_fixed")
    assert stale.returncode == 1
    assert "now: start" in stale.stderr


def test_a_failed_training_is_not_finished_and_goes_on_with_the_same_arguments_only(cluster):
    failed = cluster.start("stage1", TORCHRUN_EXIT="3")
    assert failed.returncode == 1
    assert "exit code 3" in failed.stderr
    assert not (cluster.run / "stage1/finished.json").exists()
    # Nothing was saved, so other arguments cost nothing; once there is a checkpoint they would spoil it.
    assert cluster.start("stage1", "--weight_decay", "0.1", TORCHRUN_EXIT="3").returncode == 1
    (cluster.run / "stage1/checkpoint-5").mkdir()
    assert "was: --weight_decay 0.1\n" in cluster.start("stage1").stderr
    assert cluster.start("stage1", "--weight_decay", "0.1").returncode == 0
    assert cluster.trained() == ["stage1"] * 3


def test_a_missing_predecessor_is_named_with_its_command(cluster):
    done = cluster.start("stage2_native")
    assert done.returncode == 1
    assert "PRESET=comp_1b_siglip bash scripts/comp/stage2_fixed.sh" in done.stderr
    assert cluster.launches() == []


def test_the_embedded_preset_runs_missing_predecessors_first(tmp_path):
    cluster = FakeCluster(tmp_path, preset="embedded")
    done = cluster.start("stage2_native", "--max_steps", "5")
    assert done.returncode == 0, done.stderr
    assert cluster.trained() == ["stage1", "stage2_fixed", "stage2_native"]
    assert [flag(launch, "--max_steps") == "5" for launch in cluster.launches()] == [False, False, True]


def test_a_start_from_elsewhere_needs_no_predecessor(cluster):
    done = cluster.start("stage3_sft", "--model_name_or_path", "my/own/checkpoint")
    assert done.returncode == 0, done.stderr
    assert cluster.trained() == ["stage3_sft"]


def test_missing_data_is_named_with_the_page_about_it(cluster):
    (cluster.data / "stage1.yaml").unlink()
    done = cluster.start("stage1")
    assert done.returncode == 1
    assert f"{cluster.data}/stage1.yaml is missing" in done.stderr
    assert "docs/data.md" in done.stderr
    assert (ROOT / "docs/data.md").is_file()


@pytest.fixture
def drawn(tmp_path):
    """The embedded preset with data that say they are the playground's, in the run's own folder."""
    cluster = FakeCluster(tmp_path, preset="embedded")
    cluster.data = cluster.data.rename(cluster.run / "data")
    cluster.save_prior()
    settings = {"version": VERSION, "seed": 0, "train_images": TRAIN_IMAGES, "heldout_images": HELDOUT_IMAGES}
    (cluster.data / "settings.json").write_text(json.dumps(settings))
    return cluster


def test_data_that_this_playground_drew_are_kept(drawn):
    done = drawn.start("stage1")
    assert done.returncode == 0, done.stderr
    assert f"{drawn.data}: kept" in done.stderr
    assert drawn.trained() == ["stage1"]


@pytest.mark.parametrize("change", [{"version": 0}, {"train_images": 60}])
def test_a_run_on_data_of_another_playground_stops_and_says_what_to_do(drawn, change):
    settings = json.loads((drawn.data / "settings.json").read_text()) | change
    (drawn.data / "settings.json").write_text(json.dumps(settings))
    done = drawn.start("stage1")
    assert done.returncode == 1
    ((name, value),) = change.items()
    assert f"{name} {value}, not" in done.stderr
    assert f"rm -r {drawn.run} " in done.stderr
    assert drawn.launches() == []
    assert (drawn.data / "stage1.json").exists()


def test_data_of_another_playground_are_used_where_the_user_says_so(drawn, tmp_path):
    drawn.data = drawn.data.rename(tmp_path / "mine")
    drawn.save_prior()
    (drawn.data / "settings.json").write_text('{"version": 0}')
    done = drawn.start("stage1")
    assert done.returncode == 0, done.stderr
    assert "version 0, not" in done.stderr
    assert f"{drawn.data} was chosen by you" in done.stderr
    assert drawn.trained() == ["stage1"]


def test_an_output_path_below_a_file_is_one_clear_line(cluster, tmp_path):
    (tmp_path / "file").touch()
    done = run_script("stage1", NUM_GPUS="8", DATA_ROOT=str(cluster.data), OUTPUT_ROOT=str(tmp_path / "file"))
    assert done.returncode == 1
    assert "cannot make the folder" in done.stderr.splitlines()[-1]


def test_unknown_presets_and_batches_that_do_not_divide_are_refused(cluster):
    unknown = run_script("stage1", PRESET="comp_9b")
    assert unknown.returncode == 1
    assert "comp_7b_siglip embedded smol tab4" in unknown.stderr
    odd = run_script("stage1", DRY_RUN="1", PRESET="comp_1b_siglip", NUM_GPUS="3")
    assert odd.returncode == 1
    assert "256" in odd.stderr
    assert "3 processes" in odd.stderr


SLOW_TORCHRUN = """#!/usr/bin/env bash
echo begin >>"$LAUNCHES"
until [[ -e $LAUNCHES.end ]]; do sleep 0.1; done
echo end >>"$LAUNCHES"
"""


class RunningStage:
    """stage1 in another process, held inside its training until `end_training`."""

    def __init__(self, cluster):
        self.end = cluster.launch_log.with_name(cluster.launch_log.name + ".end")
        Path(shutil.which("torchrun", path=cluster.path)).write_text(SLOW_TORCHRUN)
        self.script = self.start_another(cluster)
        wait_until(cluster.launch_log.exists)

    def start_another(self, cluster):
        places = {"OUTPUT_ROOT": str(cluster.runs), "DATA_ROOT": str(cluster.data), "PATH": cluster.path}
        environment = clean_environment(NUM_GPUS="8", LAUNCHES=str(cluster.launch_log), **places)
        script = str(ROOT / "scripts/comp/stage1.sh")
        return subprocess.Popen(["bash", script], env=environment, stderr=subprocess.PIPE, text=True)

    def end_training(self):
        self.end.touch()


def wait_until(happened):
    give_up = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_killed_scripts_training_is_waited_for_by_name(cluster):
    """SIGKILL for the script leaves its training alive; a restart says so, waits for that one and then goes on."""
    running = RunningStage(cluster)
    os.kill(running.script.pid, signal.SIGKILL)
    running.script.wait()
    restart = running.start_another(cluster)
    said = restart.stderr.readline()
    assert re.search(rf"waiting for .*process \d+, which trains into {cluster.run}/stage1", said)
    assert cluster.launch_log.read_text().split() == ["begin"]
    running.end_training()
    assert restart.wait() == 0
    assert cluster.launch_log.read_text().split() == ["begin", "end", "begin", "end"]


def test_what_finished_while_a_start_waited_is_not_trained_again(cluster):
    running = RunningStage(cluster)
    second = running.start_another(cluster)
    assert "waiting for" in second.stderr.readline()
    running.end_training()
    assert running.script.wait() == 0
    assert "finished already" in second.communicate()[1]
    assert cluster.launch_log.read_text().split() == ["begin", "end"]


def test_fresh_does_not_delete_under_a_running_training(cluster):
    running = RunningStage(cluster)
    (cluster.run / "stage1/checkpoint-5").mkdir()
    fresh = cluster.start("stage1", FRESH="1")
    running.end_training()
    assert running.script.wait() == 0
    assert fresh.returncode == 1
    assert "FRESH=1 would delete" in fresh.stderr
    assert (cluster.run / "stage1/checkpoint-5").exists()
    assert cluster.start("stage1", FRESH="1").returncode == 0
    assert not (cluster.run / "stage1/checkpoint-5").exists()


@pytest.fixture
def counting(tmp_path):
    """The embedded preset with Stage-II answers, so that words can really be counted."""
    cluster = FakeCluster(tmp_path, preset="embedded")
    write_answers(cluster.data / "stage2.json", "a red chart")
    return cluster


def write_answers(path, text):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
    path.write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": turns}]))


def test_the_word_prior_follows_data_seed_and_tokenizer(counting):
    counting.prior.unlink()
    assert counting.start("stage1").returncode == 0
    counts, about = load_counts(counting.prior)
    assert counts.sum() > 0
    data = str(counting.data / "stage2.json")
    assert (about["source"], about["tokenizer"], about["seed"]) == (data, "playground/models/llm", "42")
    # Started from a stage of this run: the same tokenizer, seed and data. Nothing is counted.
    assert f"{counting.prior}: kept" in counting.start("stage2_native").stderr
    # Its own data and another seed, of which the preset's file is no part.
    mine = counting.data / "mine.json"
    write_answers(mine, "a blue chart and a red chart")
    (counting.data / "stage2.json").unlink()
    changed = counting.start("stage2_fixed", "--data_path", str(mine), "--seed", "5", FRESH="1")
    assert changed.returncode == 0, changed.stderr
    counted_anew, about = load_counts(counting.prior)
    assert (about["source"], about["seed"]) == (str(mine), "5")
    assert counted_anew.sum() > counts.sum()


def test_a_word_prior_that_cannot_be_counted_stops_the_stage(counting):
    (counting.data / "stage2.json").unlink()
    counting.prior.write_text("half a file")
    done = counting.start("stage1")
    assert done.returncode == 1
    assert "docs/data.md" in done.stderr.splitlines()[-1]
    assert f"{counting.data}/stage2.json" in done.stderr.splitlines()[-2]
    assert counting.launches() == []


def test_a_node_does_not_wait_for_ever_for_the_first(cluster):
    cluster.prior.unlink()
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "NODE_WAIT_MINUTES": "0"}
    done = cluster.start("stage1", **nodes)
    assert done.returncode == 1
    assert f"node 1: waiting for node 0 to make {cluster.prior}" in done.stderr
    assert f"node 0 has not made {cluster.prior} in 0 minutes (NODE_WAIT_MINUTES)" in done.stderr.splitlines()[-1]
    assert cluster.launches() == []


LOCKING_TORCHRUN = """#!/usr/bin/env bash
python -c 'from llava.train.output_folder import locked; import sys
with locked(sys.argv[1]): print("begin")' "$RUN_FOLDER" >>"$LAUNCHES"
"""


def test_a_training_has_its_scripts_lock_and_one_started_by_hand_is_waited_for(cluster):
    Path(shutil.which("torchrun", path=cluster.path)).write_text(LOCKING_TORCHRUN)
    folder = cluster.run / "stage1"
    places = {"OUTPUT_ROOT": str(cluster.runs), "DATA_ROOT": str(cluster.data), "PATH": cluster.path}
    places |= {"RUN_FOLDER": str(folder), "PYTHONPATH": str(ROOT)}
    environment = clean_environment(NUM_GPUS="8", LAUNCHES=str(cluster.launch_log), **places)
    with locked(str(folder)):
        command = ["bash", str(ROOT / "scripts/comp/stage1.sh")]
        script = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert "stage1: waiting for another start" in script.stderr.readline()
        assert not cluster.launch_log.exists()
    said = script.communicate(timeout=300)[1]
    assert script.returncode == 0, said
    assert cluster.launch_log.read_text() == "begin\n"
