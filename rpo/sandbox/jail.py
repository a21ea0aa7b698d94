"""Makes a jail and becomes a program in it. A script for `sandbox` alone: it imports nothing of the project.

    python -I jail.py '{"root", "see", "argv", "env", "seconds", "wall", "memory", "report"}'

The jail is a set of new namespaces: no network, no other process to be seen, and a root in memory that holds only what a
Python interpreter needs (`see`), read-only, and one empty folder to write in, `/scratch`. Where the jail is made by root it
is then left for `nobody`; anyone else makes it in a user namespace of their own. System calls for what no limit counts or no
namespace holds are refused in it. What goes wrong is written to the file descriptor `report`, which the program does not
inherit.
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
SYS_MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = (
    442,
    0x8000,
    1 | 2 | 4,
)  # the same number on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
# Numbers of the refused calls: memory that counts as no process's (shmget, msgget, memfd_create, memfd_secret), the user's
# keys (add_key, request_key, keyctl), and namespaces in which the program would have root's rights (unshare).
MACHINES = {  # audit architecture, numbers
    "x86_64": (0xC000003E, (29, 68, 319, 447, 248, 249, 250, 272)),
    "aarch64": (0xC00000B7, (194, 186, 279, 447, 217, 218, 219, 97)),
}
SCRATCH, FILES = 2**24, 1000  # bytes in /scratch, and of any one file; files and folders there
NOBODY = 65534
CPU, WALL, REFUSED = 123, 124, 125  # exit status: past its CPU time or its time on the clock; no jail could be made

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> None:
    """The C function of that name. Raises OSError where it says -1."""
    args = [
        arg.encode() if isinstance(arg, str) else ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args
    ]
    if getattr(libc, name)(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def separate() -> None:
    """New namespaces of every kind for this process's children (and, save for process ids, for itself)."""
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
    for name, most in {
        "CPU": seconds,
        "AS": memory,
        "FSIZE": SCRATCH,
        "NOFILE": 32,
        "NPROC": 0,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def forbid() -> None:
    """Refuses the calls in MACHINES from here on (EPERM), by a filter that can not be taken off (seccomp(2))."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no filter of system calls is known for {machine}")
    arch, numbers = MACHINES[machine]
    refuse = 4 + len(numbers) + 1  # the last instruction; a jump counts from the next
    # Load the architecture, and let no other's calls through, which have other numbers; load the number: nor x86's x32.
    rules = [(0x20, 0, 0, 4), (0x15, 0, refuse - 2, arch), (0x20, 0, 0, 0), (0x35, refuse - 4, 0, 0x40000000)]
    rules += [(0x15, refuse - i - 1, 0, number) for i, number in enumerate(numbers, len(rules))]
    rules += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(rules), ctypes.addressof(code)), 0, 0)


def enter(settings: dict) -> None:
    """In the first process of the jail: everything up to and with the program itself."""
    os.setsid()  # or a signal to the program's process group would reach the process outside that keeps the time
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

    def stop(number: int, _) -> None:  # the first process of its kind takes all others in the jail with it
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
    # The limit counts ticks of the clock and `used` is exact, so the two differ a little.
    if code == -signal.SIGKILL and used.ru_utime + used.ru_stime > 0.8 * settings["seconds"]:
        return CPU
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
