"""The queue: one after the other, called off by its owner alone, and nothing forgotten by a process that was killed."""

import json
import subprocess
import sys
import threading
import time

import pytest

from animatediff.page.jobs import CANCELLED, DONE, FAILED, MAX_WAITING, RUNNING, WAITING, Job, JobQueue, Journal
from animatediff.utils import UserError


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


class Gate:
    """Work that goes on a step whenever it is let."""

    def __init__(self):
        self.steps, self.order, self.running = threading.Semaphore(0), [], 0

    def __call__(self, job: Job) -> str:
        self.order.append(job.title)
        self.running += 1
        assert self.running == 1, "one job at a time"
        try:
            for step in range(3):
                while not self.steps.acquire(timeout=0.01):
                    job.check()
                job.step(step + 1, 3)
            if job.settings.get("fails"):
                raise {"mistake": UserError("got nonsense"), "fault": KeyError("x")}[job.settings["fails"]]
            return f"made {job.title}"
        finally:
            self.running -= 1


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def queue(gate, tmp_path):
    return JobQueue(gate, Journal(tmp_path / "page.jsonl"))


def test_fifty_jobs_of_two_people_one_of_whom_goes_away(gate, queue):
    jobs = [queue.submit(f"owner {n % 2}", str(n), {}) for n in range(50)]
    gate.steps.release(1000)
    until(lambda: all(job.ended for job in jobs), 20)
    assert [job.result for job in jobs] == [f"made {n}" for n in range(50)]
    assert gate.order == [str(n) for n in range(50)]
    assert queue.finished == 50
    assert len(queue.of("owner 1")) == 25


def test_a_running_job_stops_within_a_step_and_a_waiting_one_at_once(gate, queue):
    first, second, third = (queue.submit("me", name, {}) for name in "abc")
    gate.steps.release(1)
    until(lambda: first.done == 1)
    assert queue.before(third) == 2
    queue.cancel("me", [first.id, second.id, "no such job"])
    assert second.state == CANCELLED
    until(lambda: first.state == CANCELLED)
    assert first.done == 1
    gate.steps.release(3)
    until(lambda: third.ended)
    assert (third.state, gate.order) == (DONE, ["a", "c"])


def test_nobody_calls_off_the_job_of_another(gate, queue):
    job = queue.submit("me", "a", {})
    queue.cancel("you", [job.id])
    gate.steps.release(3)
    until(lambda: job.ended)
    assert job.state == DONE


def test_a_mistake_and_a_fault_leave_the_queue_alive(gate, queue, capsys):
    jobs = [queue.submit("me", kind, {"fails": kind}) for kind in ("mistake", "fault", "")]
    gate.steps.release(9)
    until(lambda: jobs[-1].ended)
    assert [job.state for job in jobs] == [FAILED, FAILED, DONE]
    assert jobs[0].message == "got nonsense"
    assert jobs[1].message == "a fault of this program (KeyError): see its console"
    assert "KeyError: 'x'" in capsys.readouterr().err


def test_more_than_anybody_waits_for(gate, queue):
    first = queue.submit("me", "a", {})
    until(lambda: first.state == RUNNING)
    for _ in range(MAX_WAITING):
        queue.submit("me", "a", {})
    with pytest.raises(UserError, match=f"got {MAX_WAITING} clips that wait already"):
        queue.submit("me", "a", {})


def test_time_left_is_that_of_the_steps_so_far():
    job = Job("me", "a", {}, state=RUNNING)
    assert job.seconds_left is None
    job.sampling_since = time.monotonic() - 10
    job.step(5, 20)
    assert job.seconds_left == pytest.approx(30, rel=0.01)


def test_what_a_killed_process_did_not_finish_is_named_and_can_be_taken_up(gate, tmp_path):
    """Its lines, as the process left them, the last one cut off; what was finished or called off is not named."""
    path = tmp_path / "page.jsonl"

    def line(id, state, **more):
        return json.dumps({"id": id, "state": state, "note": "", "title": f"t{id}", "settings": {"n": id}} | more)

    lines = [line("a", WAITING), line("b", WAITING), line("a", RUNNING), line("c", WAITING), line("a", DONE)]
    lines += [line("b", RUNNING, note="folder"), line("c", CANCELLED), line("d", WAITING)]
    path.write_text("\n".join([*lines, '"no job"', "{}", line("e", DONE)[:30]]), encoding="utf-8")
    journal = Journal(path)
    assert [(job.id, job.note) for job in journal.unfinished] == [("b", "folder"), ("d", "")]
    queue = JobQueue(gate, journal)
    assert queue.resume("me") == 2 and not journal.unfinished
    gate.steps.release(6)
    until(lambda: all(job.ended for job in queue.of("me")))
    assert [(job.title, job.note, job.settings, job.state) for job in queue.of("me")] == [
        ("tb", "folder", {"n": "b"}, DONE),
        ("td", "", {"n": "d"}, DONE),
    ]
    journal._lock.close()
    assert not Journal(path).unfinished


def test_what_is_forgotten_is_not_named_again(tmp_path):
    path = tmp_path / "page.jsonl"
    path.write_text(json.dumps({"id": "a", "state": WAITING, "note": "", "title": "t", "settings": {}}) + "\n")
    journal = Journal(path)
    assert len(journal.unfinished) == 1
    journal.forget()
    journal._lock.close()
    assert not Journal(path).unfinished


def test_no_more_is_taken_up_than_may_wait(gate, tmp_path):
    """What is left is offered again."""
    path = tmp_path / "page.jsonl"
    path.write_text("".join(json.dumps({"id": id, "state": WAITING, "note": "", "title": id, "settings": {}}) + "\n"
                            for id in "abc"))  # fmt: skip
    queue = JobQueue(gate, Journal(path))
    for n in range(MAX_WAITING):
        queue.submit("me", str(n), {})
    until(lambda: len(queue.waiting()) == MAX_WAITING - 1)  # one is at work
    assert queue.resume("me") == 1 and [job.id for job in queue.journal.unfinished] == ["b", "c"]
    queue.cancel("me", [job.id for job in queue.of("me")])


def test_two_pages_in_one_folder(tmp_path):
    first = Journal(tmp_path / "page.jsonl")
    second = "import sys, pathlib; from animatediff.page.jobs import Journal; Journal(pathlib.Path(sys.argv[1]))"
    ended = subprocess.run([sys.executable, "-c", second, tmp_path / "page.jsonl"], capture_output=True, text=True)
    assert ended.returncode == 1 and "in which another page is at work" in ended.stderr
    assert first.unfinished == []
