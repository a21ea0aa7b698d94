"""Makes a jail and becomes a program in it. A script for `run.py`: it imports nothing of the project.

    python -I jail.py '{"root", "see", "argv", "env", "seconds", "wall", "memory", "report"}'

The jail is a set of new namespaces: no network, no other processes, and a root in memory with only what a Python interpreter
needs (`see`), read-only, and one empty writable folder, `/scratch`. Root becomes `nobody` in it; any other user makes it in
a user namespace. A filter refuses system calls that limits and namespaces do not cover. Errors are written to the file
descriptor `report`, which the program does not inherit.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys

USER, ALL = 0x10000000, 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
SYS_MOUNT_SETATTR = 442  # on every architecture
AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 0x8000, 1 | 2 | 4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
# Numbers of the refused calls: memory that no process's limit counts (shmget, msgget, memfd_create, memfd_secret), the
# user's keys (add_key, request_key, keyctl), and namespaces in which the program would have root's rights (unshare).
MACHINES = {  # audit architecture, numbers
    "x86_64": (0xC000003E, (29, 68, 319, 447, 248, 249, 250, 272)),
    "aarch64": (0xC00000B7, (194, 186, 279, 447, 217, 218, 219, 97)),
}
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
    call("mount", "tmpfs", f"{root}/scratch", "tmpfs", MS_NOSUID | MS_NODEV, room)
    os.chdir(root)
    call("pivot_root", ".", ".")  # the old root now lies over the new one
    call("umount2", ".", MNT_DETACH)
    os.chdir("/scratch")


def limit(seconds: int, memory: int) -> None:
    """Hard limits: CPU seconds, address space in bytes, files; and no process or thread beside its own."""
    limits = {"CPU": seconds, "AS": memory, "FSIZE": SCRATCH, "NOFILE": 32}
    limits |= dict.fromkeys(("NPROC", "CORE", "MEMLOCK", "MSGQUEUE"), 0)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def forbid() -> None:
    """Refuses the calls in MACHINES from here on (EPERM), by a filter that cannot be removed (seccomp(2))."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no filter of system calls is known for {machine}")
    arch, numbers = MACHINES[machine]
    refuse = 4 + len(numbers) + 1  # the last instruction; a jump counts from the next
    # Load the architecture and refuse any other, whose calls have other numbers; load the number and refuse x86's x32.
    rules = [(0x20, 0, 0, 4), (0x15, 0, refuse - 2, arch), (0x20, 0, 0, 0), (0x35, refuse - 4, 0, 0x40000000)]
    rules += [(0x15, refuse - i - 1, 0, number) for i, number in enumerate(numbers, len(rules))]
    rules += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(rules), ctypes.addressof(code)), 0, 0)


def enter(settings: dict) -> None:
    """Finishes the jail in its first process, and becomes the program."""
    os.setsid()  # or a signal to the program's process group would reach the timekeeping process outside
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build(settings["root"], settings["see"])
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # another user's process has lost it
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(settings["seconds"], settings["memory"])
    forbid()
    os.set_inheritable(settings["report"], False)
    os.execve(settings["argv"][0], settings["argv"], settings["env"])  # as no root: capabilities end here


def main(settings: dict) -> int:
    """The program's exit status, 128 + its signal, `CPU`, `WALL` or `REFUSED`."""
    jailed, stopped = 0, []

    def stop(number: int, _) -> None:  # when the first process of a PID namespace dies, all others in it die
        stopped.append(number)
        if jailed:
            os.kill(jailed, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        separate()
        jailed = os.fork()
        if not jailed:
            enter(settings)
    except BaseException as error:
        os.write(settings["report"], f"{type(error).__name__}: {error}".encode())
        os._exit(REFUSED)
    signal.setitimer(signal.ITIMER_REAL, 0.001 if stopped else settings["wall"])
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
