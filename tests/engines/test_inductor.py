"""How the compiler is driven: two C++ compilers at once, one compilation at a time, and nothing hangs or is lost."""

import os
import threading
import time

import pytest
from torch._inductor.cpp_builder import CppBuilder

from fastddpm.engines.inductor import own_folder, two_at_once
from fastddpm.kernels.native import ALIGNED

USUAL = ("a.wrapper.o", "a.kernel.o", "a.wrapper.so")


class Part(CppBuilder):
    def __init__(self, target):
        self.target, self._cflags_args = target, ""

    def get_target_file_path(self):
        return self.target


@pytest.fixture
def built(monkeypatch):
    """What was built, in the order in which it was done; the wrapper is done when the kernel is, or alone."""
    done, kernel = [], threading.Event()

    def build(builder):
        if builder.target == "a.wrapper.o":
            kernel.wait(0.5)
        if "failing" in builder.target:
            raise RuntimeError(builder.target)
        done.append(builder.target)
        if builder.target == "a.kernel.o":
            kernel.set()

    monkeypatch.setattr(CppBuilder, "build", build)
    return done


def compile_all(targets):
    for target in targets:
        Part(target).build()


def test_the_wrapper_is_compiled_beside_the_kernel(built):
    with two_at_once():
        compile_all(USUAL)
    assert built == ["a.kernel.o", "a.wrapper.o", "a.wrapper.so"]
    compile_all(USUAL[:1])
    assert built[-1] == "a.wrapper.o", "afterwards all is as it was"


def test_the_wrapper_alone_is_told_how_to_ask_for_memory(built):
    parts = [Part(target) for target in USUAL]
    with two_at_once():
        for part in parts:
            part.build()
    assert [str(ALIGNED) in part._cflags_args for part in parts] == [True, False, False]


ODD = [("a.kernel.o", "a.wrapper.o", "a.so"), ("a.wrapper.o", "a.so"), ("a.so",)]
FAILING = [("failing.wrapper.o", "a.kernel.o", "a.so"), ("a.wrapper.o", "failing.kernel.o")]


@pytest.mark.parametrize("targets", ODD, ids=str)
def test_nothing_is_linked_before_all_parts_are_there(built, targets):
    with two_at_once():
        compile_all(targets)
    assert built == list(targets)


@pytest.mark.parametrize("failing", FAILING, ids=str)
def test_a_part_that_fails_is_told(built, failing):
    with pytest.raises(RuntimeError, match="failing"), two_at_once():
        compile_all(failing)
    assert "a.so" not in built


def test_other_threads_compile_as_ever(built):
    with two_at_once():
        other = threading.Thread(target=compile_all, args=(USUAL,))
        other.start()
        other.join()
    assert built == list(USUAL)


def test_one_thread_compiles_at_a_time(monkeypatch):
    """The folder is the process's, so a second thread waits until the first has put back what was there."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    inside, most, seen = [], [], set()

    def work():
        with own_folder():
            inside.append(None)
            time.sleep(0.02)
            most.append(len(inside))
            seen.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1] and len(seen) == 1 and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
