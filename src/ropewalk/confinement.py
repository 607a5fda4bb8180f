"""What a process of ours gives up for good before it touches what a stranger sent: the network, writing, other processes.

    limits       CPU seconds, address space, no file may grow, few descriptors, no core dump; first to go when memory runs out
    privileges   no new ones, no capabilities; a network namespace of its own with nothing in it, where the system allows one
    Landlock     files outside a short list cannot be opened; where the kernel has it (5.13 and newer)
    seccomp      system calls that reach the network, other processes, the kernel's own state, or that change a file, fail

The filter lists what is refused, not what is allowed: Python, its C libraries and both C runtimes call too much, and differently on each
system, for a list of what is allowed to hold. Calls younger than the list are refused as unknown, so the list cannot grow stale.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable, Iterator
from errno import EACCES, ENOSYS, EPERM, EROFS

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWUSER, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x40000000, 0x00010000
CAPABILITIES_VERSION = 0x20080522


def _calls(table: str) -> dict[str, tuple[int, int | None]]:
    """Name: the call's number on x86_64 and on aarch64; a dash where that machine never had it."""
    rows = (row.split() for row in table.split(","))
    return {name: (int(first), None if second == "-" else int(second)) for name, first, second in rows}


NEWEST_CALL = 450
# io_uring opens sockets and files without passing this filter.
NETWORK = _calls("""
    socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
    io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427
""")
PROCESSES = _calls("""
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, kcmp 312 272, tkill 200 130,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_open 434 434, pidfd_send_signal 424 424,
    pidfd_getfd 438 438, setpriority 141 140, sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274,
    sched_setaffinity 203 122, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239, shmget 29 194,
    shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, msgget 68 186,
    msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181
""")
# The last two are memory that the limit of the address space does not count.
SYSTEM = _calls("""
    mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, open_tree 428 428,
    move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
    open_by_handle_at 304 265, name_to_handle_at 303 264, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
    keyctl 250 219, add_key 248 217, request_key 249 218, init_module 175 105, finit_module 313 273,
    delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225,
    acct 163 89, quotactl 179 60, quotactl_fd 443 443, syslog 103 116, settimeofday 164 170, clock_settime 227 112,
    adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, iopl 172 -, ioperm 173 -,
    modify_ldt 154 -, personality 135 92, fanotify_init 300 262, inotify_init 253 -, inotify_init1 294 26,
    memfd_create 319 279, memfd_secret 447 447
""")
WRITING = _calls("""
    creat 85 -, mkdir 83 -, mkdirat 258 34, mknod 133 -, mknodat 259 33, rmdir 84 -, unlink 87 -, unlinkat 263 35,
    rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
    truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
    utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
    removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16
""")
# The C runtime turns to the older call when these are unknown, and the older call shows its flags to the filter.
UNKNOWN = _calls("""
    openat2 437 437, clone3 435 435
""")
OWN_PROCESS_ONLY = _calls("""
    kill 62 129, tgkill 234 131, prlimit64 302 261
""")
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, the kernel's name for the machine

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last is what sets O_TMPFILE apart

ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, ANY_BIT, GREATER_OR_EQUAL, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
CALL_NUMBER, CALL_MACHINE = 0, 4  # offsets in the kernel's seccomp_data; arguments begin at 16, eight bytes each

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_READ_FILE, LANDLOCK_READ_FOLDER = 1 << 2, 1 << 3


class CannotConfine(Exception):
    """This system lacks what the confinement cannot do without."""


def confine(*, cpu_seconds: int, memory_bytes: int, readable: Iterable[str], listable: Iterable[str]) -> dict[str, bool]:
    """Give up everything but reading a few folders and computing; says which of the means that not every system has are in place."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    _end_first()  # before its entry in /proc is no longer its own
    _must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    namespace = libc.unshare(CLONE_NEWNET) == 0 or libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    _drop_capabilities(libc)
    _set_limits(cpu_seconds, memory_bytes)
    landlock = _restrict_files(libc, readable, listable)
    _filter_calls(libc)
    return {"network namespace": namespace, "landlock": landlock, "seccomp": True}


def die_with_parent(parent: int) -> None:
    """End when the thread that started this process ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _must(result: int, what: str) -> None:
    if result < 0:
        raise CannotConfine(f"{what} failed: {os.strerror(ctypes.get_errno())}")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Of root only the files it owns remain."""
    header, none = struct.pack("=Ii", CAPABILITIES_VERSION, 0), bytes(24)
    _must(libc.capset(header, none), "capset")


def _end_first() -> None:
    """Of all processes, when the machine runs out of memory."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # without /proc the kernel chooses by size, which is most likely this process too
        pass


def _set_limits(cpu_seconds: int, memory_bytes: int) -> None:
    """NPROC is left alone: it counts all processes of the user; the filter lets none be started."""
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A second more before the kernel kills: the signal before it says why.
        above = value + 1 if limit == resource.RLIMIT_CPU and (hard == resource.RLIM_INFINITY or hard > value) else value
        resource.setrlimit(limit, (value, above))


def _restrict_files(libc: ctypes.CDLL, readable: Iterable[str], listable: Iterable[str]) -> bool:
    """Nothing outside these can be opened, nor found by name; no TCP, no signal and no abstract socket to processes outside."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes) if version >= 6 else 16 if version >= 4 else 8, 0)
    _must(ruleset, "landlock_create_ruleset")
    for paths, rights in ((readable, LANDLOCK_READ_FILE | LANDLOCK_READ_FOLDER), (listable, LANDLOCK_READ_FOLDER)):
        for path in paths:
            try:
                beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # not there: nothing to allow
            granted = rights if os.path.isdir(path) else LANDLOCK_READ_FILE
            _must(libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", granted, beneath), 0), "landlock_add_rule")
            os.close(beneath)
    _must(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return True


def _filter_calls(libc: ctypes.CDLL) -> None:
    machine = platform.machine()
    if machine not in MACHINES:
        raise CannotConfine(f"there is no filter of system calls for a '{machine}' machine, only for {' and '.join(MACHINES)}")
    program = b"".join(_program(*MACHINES[machine], os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    filter = struct.pack(
        "HxxxxxxP" if ctypes.sizeof(ctypes.c_void_p) == 8 else "HxxP", len(program) // 8, ctypes.addressof(buffer)
    )
    _must(libc.prctl(PR_SET_SECCOMP, 2, filter, 0, 0), "prctl(PR_SET_SECCOMP)")


def _program(column: int, machine: int, pid: int) -> Iterator[bytes]:
    """The filter, as the kernel's classic BPF: a call is compared with each number in turn, and its answer stands right behind."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def argument(index: int) -> bytes:
        return step(LOAD, 16 + 8 * index)

    yield step(LOAD, CALL_MACHINE)
    yield step(EQUAL, machine, 1, 0)
    yield step(RETURN, KILL)
    yield step(LOAD, CALL_NUMBER)
    yield step(GREATER_OR_EQUAL, NEWEST_CALL + 1, 0, 1)
    yield step(RETURN, FAIL | ENOSYS)
    for calls, errno in ((NETWORK, EACCES), (PROCESSES, EPERM), (SYSTEM, EPERM), (WRITING, EROFS), (UNKNOWN, ENOSYS)):
        for number in (numbers[column] for numbers in calls.values()):
            if number is not None:
                yield step(EQUAL, number, 0, 1)
                yield step(RETURN, FAIL | errno)
    for number in (numbers[column] for numbers in OWN_PROCESS_ONLY.values()):
        assert number is not None
        # prlimit64 names this process by 0; for kill, 0 is the process group, which is this process alone.
        yield from (step(EQUAL, number, 0, 5), argument(0), step(EQUAL, pid, 2, 0), step(EQUAL, 0, 1, 0))
        yield from (step(RETURN, FAIL | EPERM), step(RETURN, ALLOW))
    for number, flags in (((2, None)[column], 1), ((257, 56)[column], 2)):  # open, openat
        if number is not None:
            yield from (step(EQUAL, number, 0, 4), argument(flags), step(ANY_BIT, WRITE_FLAGS, 0, 1))
            yield from (step(RETURN, FAIL | EROFS), step(RETURN, ALLOW))
    yield from (step(EQUAL, (56, 220)[column], 0, 4), argument(0), step(ANY_BIT, CLONE_THREAD, 1, 0))  # clone: threads only
    yield from (step(RETURN, FAIL | EPERM), step(RETURN, ALLOW))
    yield step(RETURN, ALLOW)
