"""A real launcher with real (model-less) children: start by phases, drain, crash recovery, orphans, exit codes."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[..., Any]  # the fixture `launch` of conftest.py, which makes a `Launched`


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true within half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# -- start and stop


def test_it_starts_by_phases_says_where_it_serves_and_stops_with_status_0(launch: Launch) -> None:
    run = launch("--num-shard", "2")
    run.wait_for("Try: curl http://127.0.0.1")
    assert "  max_total_tokens          128" in run.output
    assert "model max_position_embeddings" in run.output
    assert run.wait_for(r"Starting shard-1: .*--rank 1 --world-size 2")
    assert run.wait_for(r"Shard ready in .* s \(shard-0: spawn .* import .* load .* warmup")
    assert run.wait_for(r"Ready in .* s: launcher .* shard spawn")
    assert run.wait_for("router: Connected")
    assert run.stop() == 0
    assert run.leftovers() == []
    assert run.errors == []
    assert "drained" in run.output
    assert "Shutting down shards" in run.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_of_tgis_signals_drains(launch: Launch, number: int) -> None:
    run = launch(router="drain:0.3")
    run.wait_for("Try: curl")
    run.signal(number)
    assert run.ends() == 0
    assert "drained" in run.output
    assert not any(map(is_alive, run.all_pids()))


def test_a_signal_while_it_starts_ends_it_promptly(launch: Launch) -> None:
    run = launch(shard="load:hang")
    run.wait_for("shard-0: loading")
    assert run.stop() == 0
    assert "stopping before the server was ready" in run.output
    assert run.leftovers() == []


def test_a_router_that_does_not_drain_in_time_is_killed_and_the_status_is_0(launch: Launch) -> None:
    run = launch("--graceful-termination-timeout", "1", router="deaf")
    run.wait_for("Try: curl")
    assert run.stop() == 0
    assert "the grace period is over" in run.output
    assert not any(map(is_alive, run.all_pids()))


def test_a_second_signal_ends_it_at_once(launch: Launch) -> None:
    run = launch(router="deaf")
    run.wait_for("Try: curl")
    run.signal(signal.SIGTERM)
    run.wait_for("draining")
    run.signal(signal.SIGTERM)
    assert run.ends() == 128 + signal.SIGTERM
    assert run.leftovers() == []


def test_a_shard_that_ignores_sigterm_is_killed(launch: Launch) -> None:
    run = launch(shard="ready:deaf")
    run.wait_for("Try: curl")
    assert run.stop() == 0
    assert "Killing shard-0" in run.output


def test_without_a_model_it_serves_the_demo_model_and_says_so(launch: Launch) -> None:
    import tgi_demo

    if not (tgi_demo.model_path() / "model.safetensors").is_file():
        pytest.skip("the demo model is not trained yet")
    run = launch(model=False)
    run.wait_for("No --model-id given: serving the embedded demo model tgi-demo")
    run.wait_for("Try: curl")
    assert "--model-id tgi-demo" in run.output
    assert run.stop() == 0


def test_env_is_shown_and_the_start_goes_on(launch: Launch) -> None:
    run = launch("--env")
    run.wait_for("Runtime environment:")
    run.wait_for("Try: curl")
    assert "torch: " in run.output
    assert run.stop() == 0


def test_the_plan_alone_starts_nothing(launch: Launch) -> None:
    run = launch("--plan", "--max-total-tokens", "100")
    assert run.ends() == 0
    assert re.search("  max_total_tokens +100 +flag --max-total-tokens", run.output)
    assert run.all_pids() == []
    refused = launch("--plan", "--max-total-tokens", "1000")
    assert refused.ends() == 1
    assert "the model has 128 positions" in refused.errors[-1]


# -- what the children get


def test_the_api_key_travels_in_a_private_file_and_nowhere_else(launch: Launch) -> None:
    run = launch(API_KEY="geheim", HF_TOKEN="hf_secret")
    run.wait_for("Try: curl .*Authorization: Bearer")
    assert (run.folder / "router.key").read_text() == "geheim 600"
    assert "geheim" not in run.output
    assert "geheim" not in (run.folder / "router.environ").read_text()
    assert "hf_secret" not in (run.folder / "router.environ").read_text()
    assert run.stop() == 0
    assert run.leftovers() == []


def test_children_are_told_to_stay_offline_and_to_spin_little(launch: Launch) -> None:
    run = launch()
    shard = Path(f"/proc/{run.pid('shard-0')}/environ").read_text().split("\0")
    assert {"HF_HUB_OFFLINE=1", "GOMP_SPINCOUNT=2000", "TOKENIZERS_PARALLELISM=false", "RANK=0"} <= set(shard)
    assert any(entry.startswith("OMP_NUM_THREADS=") for entry in shard)


def test_the_users_openmp_settings_win(launch: Launch) -> None:
    run = launch(OMP_WAIT_POLICY="ACTIVE")
    shard = Path(f"/proc/{run.pid('shard-0')}/environ").read_text().split("\0")
    assert not any(entry.startswith("GOMP_SPINCOUNT") for entry in shard)


# -- a start that fails


def test_a_shard_that_cannot_start_ends_the_launch_with_its_own_sentence(launch: Launch) -> None:
    run = launch(shard="load:logged")
    assert run.ends() == 1
    assert "Shard 0 failed to start" in run.output
    (last,) = run.errors
    assert last.startswith('Error: ShardCannotStart("shard-0 (in phase load 2.0/2.0 GiB) exited with status 1: ')
    assert "lacks `model.norm.weight`" in last
    assert run.leftovers() == []


def test_a_traceback_of_a_failing_rank_is_shown(launch: Launch) -> None:
    run = launch("--num-shard", "2", shard="load:raise@1 load:hang@0")
    assert run.ends() == 1
    assert "ValueError: tensor model.norm.weight is missing" in run.output
    assert "shard-1" in run.errors[-1]


def test_a_shard_without_progress_is_stopped_and_its_phase_named(launch: Launch) -> None:
    run = launch("--stall-timeout", "8", shard="load:hang")
    assert run.ends() == 1
    assert "shard-0 is stuck: no progress for 8 s in phase load 2.0/2.0 GiB" in run.output


def test_a_router_that_never_serves_is_a_failed_start(launch: Launch) -> None:
    run = launch("--stall-timeout", "8", router="silent")
    assert run.ends() == 1
    assert "WebserverCannotStart" in run.errors[-1]


def test_a_router_that_ends_before_it_serves_ends_the_launch(launch: Launch) -> None:
    run = launch(router="exit3")
    assert run.ends() == 1
    assert "Webserver Crashed" in run.output
    assert "the tokenizer cannot be read" in run.errors[-1]
    assert "WebserverCannotStart" in run.errors[-1]


def test_a_router_that_dies_later_ends_the_launch(launch: Launch) -> None:
    run = launch(router="die")
    assert run.ends() == 1
    assert 'Error: WebserverFailed("router (in phase serving) was killed with SIGKILL' in run.errors[-1]
    assert not any(map(is_alive, run.all_pids()))


# -- crashes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_shard_takes_its_group_with_it_and_the_group_comes_back(launch: Launch, rank: int) -> None:
    run = launch("--num-shard", "2")
    run.wait_for("Try: curl")
    router = run.pid("router")
    os.kill(run.pid(f"shard-{rank}"), signal.SIGKILL)
    run.wait_for(f"shard-{rank} .in phase serving. was killed with SIGKILL")
    run.wait_for(f"Shard {rank} crashed")
    run.wait_for("Restarting the shards at once .restart 1 of 3.")
    run.wait_for("The shards are back .* s after the crash")
    assert not is_alive(run.pid("shard-0", 1))
    assert not is_alive(run.pid("shard-1", 1))
    assert is_alive(run.pid("shard-0", 2))
    assert is_alive(router)
    assert run.stop() == 0
    assert run.leftovers() == []


def test_a_hung_shard_is_killed_and_its_group_restarted(launch: Launch) -> None:
    run = launch("--num-shard", "2", "--step-deadline", "7", shard="ready:stop@1#1", router="hung:1")
    run.wait_for("Try: curl")
    (run.folder / "go").touch()
    run.wait_for("shard-1 is stuck: no answer within the step deadline of 7.0 s")
    run.wait_for("The shards are back")
    assert run.stop() == 0


def test_a_spent_budget_ends_with_the_first_cause(launch: Launch) -> None:
    run = launch("--restart-budget", "1", shard="ready:exit3#1 ready:kill#2")
    assert run.ends() == 1
    assert "Restarting the shards at once (restart 1 of 1)" in run.output
    assert "the first cause was: shard-0 (in phase serving) exited with status 3: something went wrong" in run.output
    assert run.errors[-1].startswith('Error: ShardFailed("shard-0 (in phase serving) exited with status 3')
    assert not any(map(is_alive, run.all_pids()))
    assert run.leftovers() == []


def test_a_restart_that_fails_counts_and_the_next_waits(launch: Launch) -> None:
    run = launch(shard="ready:exit3#1 load:exit4#2")
    run.wait_for("Restarting the shards in 1 s .restart 2 of 3.")
    run.wait_for("The shards are back")
    assert run.stop() == 0


def test_no_restart_is_tried_with_a_budget_of_0(launch: Launch) -> None:
    run = launch("--restart-budget", "0", shard="ready:kill")
    assert run.ends() == 1
    assert "Restarting" not in run.output


def test_a_crash_while_draining_is_repaired_so_that_streams_can_end(launch: Launch) -> None:
    run = launch(router="drain:3")
    run.wait_for("Try: curl")
    run.signal(signal.SIGTERM)
    run.wait_for("starting graceful shutdown")
    os.kill(run.pid("shard-0"), signal.SIGKILL)
    run.wait_for("The shards are back")
    assert run.ends() == 0
    assert "drained" in run.output


def test_a_stale_report_of_a_hang_hurts_nobody(launch: Launch) -> None:
    run = launch(router="hung:7")
    run.wait_for("Try: curl")
    (run.folder / "go").touch()
    run.wait_for("a shard does not answer")
    assert run.stop() == 0
    assert "stuck" not in run.output


# -- nothing is left behind


def test_a_grandchild_that_holds_the_pipes_delays_neither_a_restart_nor_the_end(launch: Launch) -> None:
    run = launch(shard="ready:child#1")
    run.wait_for("Try: curl")
    assert eventually(lambda: (run.folder / "grandchild").exists() and run.pid("grandchild") > 0)
    os.kill(run.pid("shard-0"), signal.SIGKILL)
    run.wait_for("The shards are back")
    assert not is_alive(run.pid("grandchild"))
    assert run.stop() == 0


def test_a_killed_launcher_leaves_no_process_no_socket_and_no_key(launch: Launch) -> None:
    run = launch("--num-shard", "2", "--api-key", "geheim", shard="ready:child@0")
    run.wait_for("Try: curl")
    grandchild = run.folder / "grandchild"
    assert eventually(lambda: grandchild.exists() and grandchild.read_text() != "")
    pids = run.all_pids()
    assert len(pids) == 4
    assert all(map(is_alive, pids))
    run.process.kill()
    run.process.wait()
    assert eventually(lambda: not any(map(is_alive, pids)))
    assert eventually(lambda: run.leftovers() == [])


def test_a_launcher_killed_while_it_starts_leaves_nothing(launch: Launch) -> None:
    run = launch(shard="import:hang")
    run.wait_for("shard-0: importing")
    pids = run.all_pids()
    run.process.kill()
    run.process.wait()
    assert eventually(lambda: not any(map(is_alive, pids)))
    assert eventually(lambda: run.leftovers() == [])


def test_a_stale_socket_is_no_obstacle(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "stale").mkdir()
    path = tmp_path / "stale" / "s-0"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    run = launch("--shard-uds-path", str(tmp_path / "stale" / "s"))
    run.wait_for("Try: curl")
    assert run.stop() == 0
    assert not path.exists()


def test_two_launchers_do_not_share_sockets(launch: Launch) -> None:
    first = launch()
    first.wait_for("Try: curl")
    second = launch("--shard-uds-path", first.prefix)
    assert second.ends() == 1
    assert "is in use: another launcher holds it" in second.errors[-1]
    assert is_alive(first.pid("shard-0"))
    assert first.stop() == 0


def test_a_taken_port_is_refused_before_anything_starts(launch: Launch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        run = launch("--port", str(taken.getsockname()[1]))
        assert run.ends() == 1
    assert "Address already in use" in run.errors[-1]
    assert "--port" in run.errors[-1]
    assert run.all_pids() == []


# -- logs


def test_with_json_output_every_line_is_a_record_and_shards_have_a_rank(launch: Launch) -> None:
    run = launch("--json-output", "--num-shard", "2", shard="load:noise")
    run.wait_for("Try: curl")
    assert run.stop() == 0
    records = [json.loads(line) for line in run.lines]
    assert all({"timestamp", "level", "message", "target"} <= record.keys() for record in records)
    assert {record["rank"] for record in records if record["target"] == "tgi_shard"} == {0, 1}
    (configuration,) = [record["configuration"] for record in records if "configuration" in record]
    assert configuration["num_shard"] == {"value": "2", "reason": "flag --num-shard"}
    assert {"plain words from a library", "a warning from a library"} <= {record["message"] for record in records}


def test_what_libraries_print_is_shown_with_its_rank(launch: Launch) -> None:
    run = launch(shard="load:noise")
    assert " INFO shard-0: plain words from a library" in run.wait_for("plain words")
    assert " WARNING shard-0: a warning from a library" in run.wait_for("a warning from a library")
    assert "\x1b[" not in run.output


def test_colours_can_be_asked_for(launch: Launch) -> None:
    run = launch(LOG_COLORIZE="1")
    assert "\x1b[" in run.wait_for("Starting shard-0")


def test_tgis_log_directives_reach_each_process(launch: Launch) -> None:
    run = launch(LOG_LEVEL="warn,text_generation_router=debug")
    run.pid("router")
    assert "--log-level\nDEBUG" in (run.folder / "router.argv").read_text()
    command = Path(f"/proc/{run.pid('shard-0')}/cmdline").read_text()
    assert "--log-level\0DEBUG" in command
