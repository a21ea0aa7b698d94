"""Makes a jail and becomes a program in it. A script for `run.py`: it imports nothing of the project.

    python -I jail.py '{"root", "see", "argv", "env", "seconds", "wall", "memory", "path_at", "filter", "parent", "report"}'

The jail is a set of new namespaces: no network, no other processes, and a root in memory with only what a Python interpreter
needs (`see`), read-only, and one empty writable folder, `/scratch`. Root becomes `nobody` in it; any other user makes it in
a user namespace. The `filter` lets only listed system calls through, and starts only the program whose path is at the address
`path_at`. The program is the first process of its PID namespace: no signal from inside ends it, and at its end all others in
there end. It is killed when this process ends, and this process when `parent` ends; neither can be undone from inside. Errors
are written to the file descriptor `report`, which the program does not inherit.
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys

USER, ALL = 0x10000000, 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
SYS_MOUNT_SETATTR = 442  # on every architecture
AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 0x8000, 1 | 2 | 4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
READ, WRITE, NEW_PRIVATE_AT, PAGE = 1, 2, 2 | 0x20 | 0x100000, 65536  # mmap's; the largest page of any machine
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


def build(root: str, see: list[str]) -> None:
    """Makes a tree in memory at `root` the root of this process: `see` and all below it read-only, and /scratch."""
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


def become(argv: list[str], env: list[str], settings: dict) -> None:
    """Starts the program, the last that can be started. Raises OSError if it cannot be."""
    path = os.fsencode(argv[0]) + b"\0"
    page = settings["path_at"] & -PAGE
    libc.mmap.restype = ctypes.c_void_p
    where = [ctypes.c_void_p(page), ctypes.c_size_t(2 * PAGE), *map(ctypes.c_int, (READ | WRITE, NEW_PRIVATE_AT, -1))]
    if libc.mmap(*where, ctypes.c_long(0)) != page:
        raise OSError(f"mmap: no room at {page:#x}")
    ctypes.memmove(settings["path_at"], path, len(path))
    lists = [(ctypes.c_char_p * (len(texts) + 1))(*map(os.fsencode, texts), None) for texts in (argv, env)]
    forbid(bytes.fromhex(settings["filter"]))
    call("execve", settings["path_at"], *lists)  # as no root: capabilities end here


def end_with(parent: int) -> None:
    """Has this process killed when its parent ends; `parent` is a pidfd of that. Raises OSError if it has ended already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([parent], [], [], 0)[0]:
        raise OSError("the process that wanted it has ended")


def enter(settings: dict, parent: int) -> None:
    """Finishes the jail in its first process, and becomes the program."""
    os.setsid()  # or a signal to the program's process group would reach the timekeeping process outside
    end_with(parent)
    build(settings["root"], settings["see"])
    call("sethostname", "sandbox", 7)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        end_with(parent)  # another user's process has lost it
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(settings["seconds"], settings["memory"])
    os.set_inheritable(settings["report"], False)
    become(settings["argv"], [f"{name}={value}" for name, value in settings["env"].items()], settings)


def main(settings: dict) -> int:
    """The program's exit status, 128 + its signal, `CPU`, `WALL` or `REFUSED`."""
    jailed, stopped = 0, []

    def stop(number: int, _) -> None:  # when the first process of a PID namespace dies, all others in it die
        stopped.append(number)
        if jailed:
            os.kill(jailed, signal.SIGKILL)

    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        parent = os.pidfd_open(settings["parent"])
        separate()
        end_with(parent)
        own = os.pidfd_open(os.getpid())
        jailed = os.fork()
        if not jailed:
            enter(settings, own)
    except BaseException as error:
        os.write(settings["report"], f"{type(error).__name__}: {error}".encode())
        os._exit(REFUSED)
    signal.setitimer(signal.ITIMER_REAL, 0.001 if stopped else settings["wall"])
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


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
