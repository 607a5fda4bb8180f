"""The sandbox: what comes back, what is refused, what happens to a process that goes wrong."""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from ropewalk import confinement, sandbox, sandbox_child
from ropewalk.errors import DocumentError, Overloaded, SandboxFailed
from ropewalk.sandbox import call, call_async


def evaluate(expression, **limits):
    return call("builtins:eval", (expression,), **limits)


def refused(expression):
    """What the expression raises inside."""
    with pytest.raises(SandboxFailed) as caught:
        evaluate(expression)
    assert caught.value.reason == "failure"
    return str(caught.value)


def test_json_and_bytes_come_back():
    assert evaluate("{'a': [1, 2.5, None, 'é']}") == {"a": [1, 2.5, None, "é"]}
    assert evaluate("b'a\\0b'") == b"a\0b"


def test_data_is_the_first_argument_and_may_be_empty():
    assert call("builtins:len", data=b"x" * 3_000_000) == 3_000_000
    assert call("builtins:len", data=b"") == 0
    assert call("operator:contains", (98,), data=b"abc") is True


def test_arguments_may_be_large():
    assert call("builtins:len", ("x" * 3_000_000,)) == 3_000_000


def test_each_call_has_a_process_of_its_own():
    pids = {evaluate("__import__('os').getpid()") for _ in range(3)}
    assert len(pids) == 3
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('socket').socket()",
        "__import__('socket').socketpair()",
        "__import__('socket').socket(__import__('socket').AF_UNIX)",
        "__import__('socket').create_connection(('127.0.0.1', 1))",
        "__import__('os').fork()",
        "__import__('os').posix_spawn('/bin/true', ['true'], {})",
        "__import__('os').execv('/bin/true', ['true'])",
        "__import__('os').kill(__import__('os').getppid(), 0)",
        "__import__('resource').prlimit(__import__('os').getppid(), 7)",
        "__import__('os').sched_setaffinity(__import__('os').getppid(), {0})",
        "__import__('os').memfd_create('x')",
        "open('/dev/null', 'w')",
        "__import__('os').mkdir('x')",
        "__import__('os').chmod('.', 0o777)",
        "__import__('os').open('.', __import__('os').O_TMPFILE | __import__('os').O_RDWR)",
        "__import__('tempfile').TemporaryFile()",
        "__import__('resource').setrlimit(0, (-1, -1))",
    ],
)
def test_network_processes_and_writing_are_refused(expression):
    said = refused(expression)
    assert any(
        word in said for word in ("Permission denied", "not permitted", "Read-only", "not allowed", "No usable temporary")
    )


def test_calls_without_a_name_in_the_list_are_unknown():
    said = evaluate(
        "(lambda c: [c.CDLL(None, use_errno=True).syscall(n, 0, 0, 0) for n in (451, 425, 437)])(__import__('ctypes'))"
    )
    assert said == [-1, -1, -1]


def test_files_outside_are_not_readable_where_the_kernel_has_landlock(tmp_path):
    if not sandbox.containment()["landlock"]:
        pytest.skip("this kernel has no Landlock")
    secret = tmp_path / "root.key"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/environ"):
        assert "Permission denied" in refused(f"open({str(path)!r}).read()")
    assert "Permission denied" in refused("__import__('os').listdir('/')")


def test_the_environment_holds_no_secret(monkeypatch):
    monkeypatch.setenv("ROPEWALK_ROOT_KEY", "secret")
    assert set(evaluate("dict(__import__('os').environ)")) <= {
        *("LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX", "LD_LIBRARY_PATH")
    }


def test_no_file_of_this_process_is_open_in_it(tmp_path):
    with open(tmp_path / "kept", "wb") as kept:
        os.set_inheritable(kept.fileno(), True)
        assert "Bad file descriptor" in refused(f"__import__('os').fstat({kept.fileno()})")


DROP = 'import ctypes, struct; ctypes.CDLL(None).capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)); '


def test_without_capabilities_it_holds_as_well():
    """As an ordinary user has it: the network namespace may then be missing, the filter not."""
    code = (
        DROP
        + """
if True:
        import json
        from ropewalk import sandbox
        try:
            sandbox.call("socket:socket")
        except sandbox.SandboxFailed as error:
            print(json.dumps([sandbox.containment()["seccomp"], str(error)]))
    """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seccomp, said = json.loads(done.stdout)
    assert seccomp
    assert "Permission denied" in said


def test_each_limit_gives_its_reason():
    for expression, limits, reason in (
        ("__import__('time').sleep(30)", {"seconds": 0.3}, "time"),
        ("sum(range(10**12))", {"seconds": 0.3}, "time"),
        ("sum(range(10**12))", {"seconds": 30, "cpu_seconds": 1}, "cpu"),
        ("len(bytes(1 << 30))", {"memory_bytes": 1 << 28}, "memory"),
        ("'x' * 2000", {"result_bytes": 1000}, "result"),
        ("__import__('os').abort()", {}, "crash"),
        ("__import__('ctypes').string_at(0)", {}, "crash"),
        ("__import__('os')._exit(0)", {}, "crash"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", {}, "killed"),
        ("1 / 0", {}, "failure"),
        ("{1, 2}", {}, "failure"),
        ("(_ for _ in ()).throw(SystemExit(3))", {}, "crash"),
    ):
        with pytest.raises(SandboxFailed) as caught:
            evaluate(expression, **limits)
        assert caught.value.reason == reason, (expression, caught.value)
        assert "builtins:eval" in str(caught.value)


def test_memory_is_bounded_whatever_asks_for_it():
    """A thread's stack, an anonymous mapping: all count as address space."""
    mapping = "__import__('mmap').mmap(-1, 1 << 30)"
    with pytest.raises(SandboxFailed):
        evaluate(f"bool({mapping})", memory_bytes=1 << 28)


def test_an_error_for_the_user_keeps_its_class_code_and_details():
    with pytest.raises(DocumentError, match="a side of 9000") as caught:
        evaluate(
            "(_ for _ in ()).throw(__import__('ropewalk.errors').errors.DocumentError("
            "'a side of 9000', 'image_dimensions_too_large', max_side_length_pixels=8000))"
        )
    assert caught.value.error_code == "image_dimensions_too_large"
    assert caught.value.details == {"max_side_length_pixels": 8000}


def frame(kind, payload):
    return sandbox_child.READY + kind + len(payload).to_bytes(8, "big") + payload


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"R",
        b"nonsense",
        frame(b"J", b"[" * 100_000),
        frame(b"J", b"{"),
        frame(b"J", b"1" * 10_000),
        frame(b"E", b"[]"),
        frame(b"E", b'{"class": "Popen", "message": "x"}'),
        frame(b"E", b'{"class": "annotations", "message": "x"}'),
        frame(b"E", b'{"class": "RopewalkError", "message": "x"}'),
        frame(b"Z", b"1"),
        frame(b"J", b"1")[:-1],
        frame(b"J", b"1") + b"2",
    ],
    ids=range(13),
)
def test_what_a_captured_process_sends_is_not_trusted(sent):
    """It writes into the pipe itself, whose number it learns from its arguments."""
    write = f"__import__('os').write(int(__import__('sys').argv[2]), {sent[1:] if sent[:1] == b'R' else sent!r})"
    with pytest.raises(SandboxFailed) as caught:
        evaluate(f"{write} and None or __import__('os')._exit(0)")
    assert caught.value.reason in ("crash", "failure")


def test_a_function_that_is_not_there_is_our_own_fault():
    with pytest.raises(RuntimeError, match="No module named"):
        call("ropewalk.nowhere:function")


@pytest.mark.parametrize("before", ["", DROP], ids=["as it is", "without capabilities"])
def test_the_process_ends_with_the_one_that_asked(before):
    sleep = "call('builtins:eval', (\"__import__('time').sleep(60)\",))"
    parent = subprocess.Popen([sys.executable, "-c", f"{before}from ropewalk.sandbox import call; {sleep}"])
    child = wait_for(lambda: children(parent.pid))[0]
    wait_for(lambda: filtered(child))
    with open(f"/proc/{child}/oom_score_adj") as file:
        assert file.read() == "1000\n"
    parent.kill()
    parent.wait()
    wait_for(lambda: not os.path.exists(f"/proc/{child}"))


def filtered(pid):
    with open(f"/proc/{pid}/status") as file:
        return "Seccomp:\t2" in file.read()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_calls_of_one_loop_run_side_by_side_but_not_all_at_once(monkeypatch):
    monkeypatch.setattr(sandbox, "AT_ONCE", 2)
    monkeypatch.setattr(sandbox, "WAITING", 3)

    async def many():
        calls = [
            call_async("builtins:eval", ("[__import__('time').time(), __import__('time').sleep(.3)][0]",)) for _ in range(6)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(many())
    assert sum(isinstance(answer, Overloaded) for answer in answers) == 1
    starts = sorted(answer for answer in answers if isinstance(answer, float))
    assert len(starts) == 5
    assert all(later - earlier >= 0.3 for earlier, later in zip(starts, starts[2:], strict=False))


def test_data_in_pieces_is_one_argument():
    async def pieces():
        for piece in (b"one ", b"", b"two"):
            yield piece

    assert asyncio.run(call_async("builtins:bytes", data=pieces())) == b"one two"


def test_a_cancelled_call_leaves_no_process():
    async def cancelled():
        task = asyncio.ensure_future(call_async("builtins:eval", ("__import__('time').sleep(60)",)))
        started = await asyncio.to_thread(wait_for, lambda: set(tasks()) - before)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return started

    before = set(tasks())
    started = asyncio.run(cancelled())
    assert not started & set(tasks())


def tasks():
    """The child processes of every thread of this process."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{thread}/children") as file:  # threads end
            found += [int(word) for word in file.read().split()]
    return found


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = len(os.listdir("/proc/self/fd"))
    evaluate("1")
    with pytest.raises(SandboxFailed):
        evaluate("__import__('os').abort()")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files


def test_the_filter_fits_the_kernel_and_knows_both_machines():
    for column, machine in confinement.MACHINES.values():
        program = b"".join(confinement._program(column, machine, 1))
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096  # BPF_MAXINSNS


def test_the_child_does_not_import_what_it_does_not_need():
    loaded = evaluate("list(__import__('sys').modules)")
    assert not {"torch", "asyncio", "subprocess", "sqlalchemy", "starlette"} & set(loaded)
