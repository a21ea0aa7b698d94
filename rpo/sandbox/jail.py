"""Holds exams in jails, one after another. A script for `run.py`: it imports nothing of the project.

    python jail.py '{"harness", "see", "seconds", "memory", "wall", "filter"}'      a Unix socket as its standard input

For each byte that comes with two file descriptors, an exam and a pipe for the verdict, both sides of `harness` run in a jail each, and
the answer is {"program", "tests": exit statuses, "refused": why no jail could be made}. Processes are forked from this one, which
never holds an exam: starting Python anew for each would take most of the time.

A jail is a set of new namespaces: no network, no other processes, and a root in memory with only what a Python interpreter
needs (`see`), read-only, and one empty writable folder, `/scratch`. Root becomes `nobody` in it; any other user makes it in
a user namespace. The `filter` lets only listed system calls through. The program is the first process of its PID namespace: no
signal from inside ends it, and at its end all others in there end. It is killed when the process that keeps its time ends, that when
this one ends, and this one ends when the socket closes; none of it can be undone from inside.
"""

import ctypes
import gc
import importlib.machinery
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable

USER, ALL = 0x10000000, 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
SYS_MOUNT_SETATTR = 442  # on every architecture
AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 0x8000, 1 | 2 | 4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
CAPABILITIES = 0x20080522  # version of struct __user_cap_header_struct
ROOT = "/dev"  # where the new root is mounted, which nothing below is needed for: no folder is made that a kill would leave
GRACE = 1  # seconds that the program may take to end after its exam
SCRATCH, FILES = 2**24, 1000  # bytes in /scratch, and of any one file; files and folders there
NOBODY = 65534
CPU, WALL, REFUSED = 123, 124, 125  # exit status: out of CPU time or wall time; no jail could be made

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> None:
    """Calls the C function of that name. Raises OSError if it returns -1."""
    args = [arg.encode() if isinstance(arg, str) else arg for arg in args]
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    if getattr(libc, name)(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def separate() -> None:
    """Makes new namespaces of every kind for this process's children (and, except for process ids, for itself)."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", ALL if uid == 0 else ALL | USER)
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build(see: list[str], root: str = ROOT) -> None:
    """Makes a tree in memory the root of this process: `see` and all below it read-only, and /scratch."""
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in see:
        inside = root + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):  # /lib is /usr/lib on many systems
            os.symlink(os.readlink(path), inside)
        elif not os.path.isdir(inside):  # already there, below another
            os.makedirs(inside)
            call("mount", path, inside, None, MS_BIND | MS_REC, None)
    os.makedirs(f"{root}/scratch")
    flags = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID_NODEV, 0, 0, 0)  # struct mount_attr: attr_set first
    call("syscall", SYS_MOUNT_SETATTR, -1, root, AT_RECURSIVE, flags, ctypes.sizeof(flags))
    room = f"size={SCRATCH},nr_inodes={FILES},mode=777"
    call("mount", "tmpfs", f"{root}/scratch", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, room)
    os.chdir(root)
    call("pivot_root", ".", ".")  # the old root now lies over the new one
    call("umount2", ".", MNT_DETACH)
    os.chdir("/scratch")


def limit(seconds: int, memory: int) -> None:
    """Hard limits: CPU seconds, address space in bytes, files; no process or thread beside its own, no queued signals.

    Page tables come on top of the address space: of the kernel's 65,530 mappings (vm.max_map_count) each can take 12 KiB.
    """
    limits = {"CPU": seconds, "AS": memory, "FSIZE": SCRATCH, "NOFILE": 32}
    limits |= dict.fromkeys(("NPROC", "MEMLOCK", "MSGQUEUE", "SIGPENDING"), 0)
    limits["CORE"] = 1  # 0 would still start the system's program that collects core dumps, if it has one
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def forbid(code: bytes) -> None:
    """Refuses system calls from here on, by a filter that cannot be removed (seccomp(2))."""
    rules = ctypes.create_string_buffer(code, len(code))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(rules)), 0, 0)


def end_with(parent: int) -> None:
    """Has this process killed when its parent ends; `parent` is a pidfd of that. Raises OSError if it has ended already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([parent], [], [], 0)[0]:
        raise OSError("the process that wanted it has ended")


def enter(settings: dict, parent: int) -> None:
    """Finishes the jail in its first process."""
    os.setsid()  # or a signal to the program's process group would reach the timekeeping process outside
    end_with(parent)
    build(settings["see"])
    call("sethostname", "sandbox", 7)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        end_with(parent)  # another user's process has lost it
    call("capset", struct.pack("Ii", CAPABILITIES, 0), bytes(24))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(settings["seconds"], settings["memory"])
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    forbid(bytes.fromhex(settings["filter"]))


def close_all_but(*kept: int) -> None:
    """Closes every file descriptor but the standard ones and those."""
    for below, above in zip((2, *sorted(kept)), (*sorted(kept), 2**30), strict=True):
        os.closerange(below + 1, above)


def keep(settings: dict, wall: int, ends: dict[int, int], side: Callable[[], None], parent: int, report: int) -> int:
    """The exit status of `side` in a jail, 128 + its signal, `CPU`, `WALL` or `REFUSED`. In the jail it does not return.

    `ends` are the file descriptors that `side` has: which, by which number; `parent` is a pidfd of the process to end with.
    """
    jailed, stopped = 0, []

    def stop(number: int, _) -> None:  # when the first process of a PID namespace dies, all others in it die
        stopped.append(number)
        if jailed:
            os.kill(jailed, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        separate()
        end_with(parent)
        own = os.pidfd_open(os.getpid())
        jailed = os.fork()
        if not jailed:
            enter(settings, own)
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}\n".encode())
        os._exit(REFUSED)
    if not jailed:
        for number, end in ends.items():
            os.dup2(end, number)
        close_all_but(*(number for number in ends if number > 2))
        side()
        sys.exit()
    close_all_but()  # or neither side would see the other end
    signal.setitimer(signal.ITIMER_REAL, 0.001 if stopped else wall)
    _, status, used = os.wait4(jailed, 0)
    while os.WIFSTOPPED(status):  # not its end, and nothing that a program in a jail is left to do
        os.kill(jailed, signal.SIGKILL)
        _, status, used = os.wait4(jailed, 0)
    code = os.waitstatus_to_exitcode(status)
    if signal.SIGALRM in stopped:
        return WALL
    # The limit counts clock ticks and `used` is exact, so the two differ a little.
    if code == -signal.SIGKILL and used.ru_utime + used.ru_stime > 0.8 * settings["seconds"]:
        return CPU
    return code if code >= 0 else 128 - code


def hold(settings: dict, harness: types.ModuleType, wire: socket.socket, exam: int, verdict: int) -> dict:
    """Holds one exam. Raises EOFError if who wanted it has ended."""
    requests, replies, report, own = os.pipe(), os.pipe(), os.pipe(), os.pidfd_open(os.getpid())

    def start(wall: int, ends: dict[int, int], side: Callable[[], None]) -> tuple[int, int]:
        if pid := os.fork():
            return pid, os.pidfd_open(pid)
        os._exit(keep(settings, wall, ends, side, own, report[1]))

    def end(pid: int, pidfd: int, seconds: float | None = None) -> int:
        ready, _, _ = select.select([pidfd, wire], [], [], seconds)
        if wire in ready:
            raise EOFError
        if not ready:
            os.kill(pid, signal.SIGTERM)
        os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    program = start(settings["wall"], {0: requests[0], 1: replies[1]}, harness.serve)
    # The tests' side outlives the program's, whose end it reports.
    ends = {0: exam, 1: verdict, 30: requests[1], 31: replies[0]}  # numbers that are free, below the limit of files
    tests = start(settings["wall"] + 5, ends, lambda: harness.verdict(30, 31))
    for fd in (*requests, *replies, report[1], own, exam, verdict):
        os.close(fd)
    statuses = {"tests": end(*tests), "program": end(*program, GRACE)}  # without more requests it ends
    with os.fdopen(report[0]) as reports:
        return statuses | {"refused": reports.readline().strip()}  # of two sides that fail one is enough


def main(settings: dict) -> None:
    """Holds exams until the socket closes."""
    harness = types.ModuleType("harness")
    importlib.machinery.SourceFileLoader("harness", settings["harness"]).exec_module(harness)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    sys.set_int_max_str_digits(0)  # CPU time has its own limit
    wire = socket.socket(fileno=os.dup(0))
    gc.freeze()
    while fds := socket.recv_fds(wire, 1, 2)[1]:
        try:
            answer = hold(settings, harness, wire, *fds)
        except EOFError:
            return
        except OSError as error:
            wire.send(json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode())
            return  # what has been started ends too
        wire.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
