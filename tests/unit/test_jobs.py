"""Who gets which prompt: late ones go to a second server once, answers count once, a full server gets nothing."""

import threading
import time
from dataclasses import replace

from planned_server import Planned, completion, error, serving

from recbole_mllm.endpoints import Endpoint
from recbole_mllm.mllm.base import Ask, Batch, Decoding
from recbole_mllm.mllm.host import Host
from recbole_mllm.mllm.jobs import Job, Jobs
from recbole_mllm.mllm.server import ServerModel
from recbole_mllm.prompts import Prompt
from recbole_mllm.settings import ServerSettings

SETTINGS = ServerSettings(2, 5.0, 20.0, None)


def host(name):
    return Host(f"http://{name}/v1", "m", SETTINGS, None)


def job(n):
    return Job(Ask(n, Prompt(f"p{n}"), Decoding(1)))


def jobs_with_a_usual_time(server):
    """Return jobs of which one was answered at once, so that what is late can be told."""
    jobs = Jobs()
    jobs.put(job(0))
    assert jobs.back(jobs.next(server, 0.1), server, answered=True)
    return jobs


def test_a_late_prompt_goes_to_one_idle_server_more_and_its_first_answer_counts():
    slow, idle, third = host("slow"), host("idle"), host("third")
    jobs = jobs_with_a_usual_time(slow)
    late = job(1)
    jobs.put(late)
    assert jobs.next(slow, 0.1) is late
    assert jobs.next(idle, 0.0) is None  # not late yet
    time.sleep(0.55)
    assert jobs.next(slow, 0.0) is None  # not to the one that has it
    assert jobs.next(idle, 0.0) is late and jobs.next(third, 0.0) is None
    assert jobs.back(late, idle, answered=True)
    assert not jobs.back(late, slow, answered=True)


def test_trouble_at_one_of_two_servers_leaves_the_prompt_to_the_other():
    slow, idle = host("slow"), host("idle")
    jobs = jobs_with_a_usual_time(slow)
    late = job(1)
    jobs.put(late)
    jobs.next(slow, 0.1)
    time.sleep(0.55)
    jobs.next(idle, 0.0)
    assert not jobs.back(late, slow, answered=False)
    assert jobs.back(late, idle, answered=False)  # nobody has it any more: the caller puts it back


def test_a_failing_server_takes_what_waits_to_be_tried_with_but_no_late_prompts():
    slow, failing = host("slow"), host("failing")
    jobs = jobs_with_a_usual_time(slow)
    jobs.put(job(1))
    jobs.next(slow, 0.1)
    failing.failing_since = time.monotonic()
    time.sleep(0.55)
    assert jobs.next(failing, 0.0) is None
    jobs.put(waiting := job(2))
    assert jobs.next(failing, 0.0) is waiting


def test_prompts_that_failed_at_a_server_which_never_answered_are_not_given_up_for_it():
    prompts = [Prompt(f"p{n}") for n in range(12)]
    with serving(Planned(lambda n, text: error(500, "broken"))) as broken, serving(Planned(delay=0.3)) as slow:
        work = Batch(prompts, Decoding(1))
        ServerModel(Endpoint("m", (broken.url, slow.url)), SETTINGS).write(work)
    assert {place: answer.text for place, answer in work.answers.items()} == {n: f"P{n}" for n in range(12)}


def test_no_more_than_allowed_is_under_way_at_a_server_that_hung_in_an_earlier_round():
    freed = threading.Event()

    def plan(n, text):
        freed.wait(20)
        return completion(text.upper())

    with serving(Planned(plan)) as hangs, serving(Planned(delay=0.02)) as other:
        model = ServerModel(Endpoint("m", (hangs.url, other.url)), replace(SETTINGS, server_timeout=20.0))
        for _ in range(4):
            work = Batch([Prompt(f"p{n}") for n in range(20)], Decoding(1))
            model.write(work)
            assert len(work.answers) == 20
        assert hangs.most_active <= 2 and len(hangs.bodies) <= 2
        freed.set()
