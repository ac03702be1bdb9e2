"""What is told of errors that were raised on other processes."""

from ray.exceptions import RayTaskError

from orchestration.cluster import first_cause


def test_an_error_of_a_task_comes_down_to_what_was_raised_there():
    raised = KeyError("MPO")
    wrapped = RuntimeError("user code failed")
    wrapped.__cause__ = raised
    task = RayTaskError("MapWorker.submit", "Traceback ...", wrapped)
    outer = RayTaskError("read", "Traceback ...", task)
    assert [first_cause(error) for error in (outer, task, wrapped, raised)] == [raised] * 4
