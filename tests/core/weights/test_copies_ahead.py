"""Copies that are begun before they are needed: which, how many, and that nothing is read before it is there."""

import contextlib

import pytest
import torch

from sara_core.weights import copies_ahead
from sara_core.weights.copies_ahead import BEHIND, CopiesAhead

CPU = torch.device("cpu")


class Backend:
    """Streams and events of a graphics card that there is not; writes down what is done with them."""

    def __init__(self):
        self.log, self.names = [], {}
        backend = self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.name = name

            def synchronize(self):
                backend.log.append(("host waits", self.name))

            def wait_event(self, event):
                backend.log.append(("wait", event.of))

        class Event:
            def record(self, stream):
                self.of = backend.copied if stream.name == "side" else "use"

            def synchronize(self):
                backend.log.append(("host waits", self.of))

        self.Stream, self.Event, self.main = Stream, Event, Stream(name="main")

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    def current_stream(self, device):
        return self.main


class Watched(torch.Tensor):
    """A tensor that says when it is copied."""

    @staticmethod
    def __new__(cls, backend, name, value):
        made = torch.full((2,), float(value)).as_subclass(cls)
        made.backend, made.label = backend, name
        return made

    def to(self, device, **options):
        self.backend.log.append(("copy", self.label))
        self.backend.copied = self.label
        return self.as_subclass(torch.Tensor).to(device, **options)


@pytest.fixture
def copying(monkeypatch):
    monkeypatch.setattr(copies_ahead, "_record", lambda tensor, stream: None)
    backend = Backend()
    weights = {name: Watched(backend, name, i) for i, name in enumerate("abcd")}
    return backend, weights, CopiesAhead(CPU, backend)


def use(copying, names):
    """Take copies in an order; returns what was logged for each."""
    backend, weights, copies = copying
    found = []
    for name in names:
        backend.log.clear()
        copy = copies.take(weights[name])
        assert copy.tolist() == [float("abcd".index(name))] * 2
        assert copy.data_ptr() != weights[name].data_ptr()
        found.append(list(backend.log))
    return found


def test_from_the_second_time_on_each_copy_is_begun_when_the_one_before_is_taken(copying):
    first = use(copying, "abcd")
    assert [log[0] for log in first] == [("copy", name) for name in "abcd"]
    second = use(copying, "abcdabcd")
    for name, log in zip("abcdabcd", second, strict=True):
        assert ("wait", name) in log
    for log, following in zip(second[4:], "bcda", strict=True):
        assert [entry for entry in log if entry[0] == "copy"] == [("copy", following)]
        assert log.index(("copy", following)) > log.index(next(e for e in log if e[0] == "wait"))


def test_a_wrong_guess_is_copied_anew(copying):
    use(copying, "abcdabcd")
    (log,) = use(copying, "c")  # where a was expected
    assert ("copy", "c") in log
    assert ("wait", "c") in log


def test_the_way_back_is_not_taken_for_the_way_there(copying):
    backend, weights, copies = copying

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            use(copying, name)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            logs.append((ctx.name, use(copying, ctx.name)[0]))
            return gradient, None

    for _ in range(3):
        logs = []
        x = torch.ones(1, requires_grad=True)
        for name in "abcd":
            x = Through.apply(x, name)
        x.backward()
    for (name, log), following in zip(logs[:-1], "cba", strict=True):
        assert [entry for entry in log if entry[0] == "copy"] == [("copy", following)], name


def test_the_host_is_never_far_ahead_of_the_device(copying):
    logs = use(copying, "abcdabcd")
    waits = [log.count(("host waits", "use")) for log in logs]
    assert waits == [0] * BEHIND + [1] * (8 - BEHIND)


def test_a_copy_ahead_that_finds_no_memory_is_made_when_it_is_asked_for(copying, monkeypatch):
    backend, weights, copies = copying
    use(copying, "abcdabcd")
    begin, failed = copies._begin, []

    def fail(waiting):
        if waiting is weights["b"] and not failed:
            failed.append(waiting)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(waiting)

    monkeypatch.setattr(copies, "_begin", fail)
    use(copying, "ab")  # b ahead of its use, and then again
    assert failed


def test_where_memory_ran_out_no_copy_is_begun_ahead_for_a_while(copying, monkeypatch):
    backend, weights, copies = copying
    monkeypatch.setattr(copies_ahead, "PAUSE", 5)
    use(copying, "abcdabcd")
    begin, begun = copies._begin, []

    def fail_first(waiting):
        begun.append(waiting.label)
        if len(begun) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(waiting)

    monkeypatch.setattr(copies, "_begin", fail_first)
    use(copying, "abcdab")  # a is there; b finds no memory, and b to b are made when asked for
    use(copying, "cd")
    assert begun == ["b", *"bcdab", *"cda"]


def test_other_errors_of_a_copy_ahead_are_raised(copying, monkeypatch):
    backend, weights, copies = copying
    use(copying, "abcdabcd")

    def fail(waiting):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(copies, "_begin", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        use(copying, "a")  # which is there; b fails


def test_nothing_is_held_once_forgotten(copying):
    backend, weights, copies = copying
    use(copying, "abcdabcd")
    copies.forget()
    assert backend.log[-1] == ("host waits", "side")  # what is being copied must not change before
    assert copies._begun is None
    assert not copies._following
    assert not copies._used


def test_without_streams_a_copy_is_made_when_it_is_asked_for():
    copies, weight = CopiesAhead(CPU), torch.ones(3)
    copy = copies.take(weight)
    assert torch.equal(copy, weight)
    assert copy.data_ptr() != weight.data_ptr()
