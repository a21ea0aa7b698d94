"""The system calls that a jailed program may make, and the kernel's filter that refuses all others.

What Python and its standard library need for calculating, for files in /scratch and for their own signals, on each machine
by its own numbers. Not there: other programs, processes and threads, sockets of any family, tracing, namespaces, keys, and what
takes kernel memory that no limit counts (System V and POSIX queues and semaphores, memory files, locks on ranges of a file,
timers, io_uring, larger pipes) or burdens the machine's disks and files (locks and flushes of what is only read).
"""

import errno
import struct

# Audit architecture; calls of any other are refused, since they have other numbers.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name, number on x86_64, number on aarch64, which lacks the older calls
_ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70, lseek 8 62,
open 2 -, openat 257 56, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291,
statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78,
getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -,
symlinkat 266 36, truncate 76 45, ftruncate 77 46, chmod 90 -, fchmod 91 52, fchmodat 268 53, utimensat 280 88,
umask 95 166, listxattr 194 11, llistxattr 195 12, flistxattr 196 13, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10,

brk 12 214, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233,

time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
alarm 37 -, setitimer 38 103, getitimer 36 102,

rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, kill 62 129, tgkill 234 131, restart_syscall 219 128,

getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150,
prlimit64 302 261, getrusage 98 165, times 100 153, uname 63 160, sysinfo 99 179, getpriority 140 141, sched_yield 24 124,
sched_getaffinity 204 123, getcpu 309 168, getrandom 318 278,

exit 60 93, exit_group 231 94, futex 202 98, set_tid_address 218 96, set_robust_list 273 99, rseq 334 293, arch_prctl 158 -
"""
# Calls of many uses, of which a few are allowed by their second argument: of fcntl the flags and copies of a descriptor
# (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ), of ioctl whether it is a terminal (TCGETS,
# TCGETS2), its size, closing at exec, bytes to read and waiting for them (TIOCGWINSZ, FIOCLEX, FIONCLEX, FIONREAD, FIONBIO).
_BY_ARGUMENT = {
    "fcntl 72 25": (0, 1, 2, 3, 4, 1030, 1032),
    "ioctl 16 29": (0x5401, 0x802C542A, 0x5413, 0x5451, 0x5450, 0x541B, 0x5421),
}
# Not made, with the answer that a program gets on a machine without the thing: done (there is nothing to flush in memory), no
# more processes, no address family.
_REFUSED = {
    0: "fsync 74 82, fdatasync 75 83, msync 26 227",
    errno.EAGAIN: "fork 57 -, vfork 58 -, clone 56 220, clone3 435 435",
    errno.EAFNOSUPPORT: "socket 41 198, socketpair 53 199",
}
X32, NEWER = 0x40000000, 451  # numbers from here on: x86's x32 calls; calls that this table is too old to know

_LOAD, _IS, _FROM, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF: load a word, jump if equal, jump if not less, return
_NUMBER, _ARCHITECTURE, _SECOND = 0, 4, 24  # offsets into struct seccomp_data, both machines little-endian
_ALLOW = (_RETURN, 0, 0, 0x7FFF0000)


def numbers(names: str, machine: str) -> dict[str, int]:
    """Number of each call in lines of `name x86_64 aarch64`, of those that the machine has."""
    column = 1 + list(MACHINES).index(machine)
    rows = [row.split() for row in names.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def allowed(machine: str) -> dict[str, int]:
    """Number of each allowed call, fcntl and ioctl with some second arguments alone."""
    return numbers(", ".join((_ALLOWED, *_BY_ARGUMENT)), machine)


def filter_of(machine: str) -> bytes:
    """The filter as seccomp(2) takes it, instructions of classic BPF. Raises OSError on a machine whose numbers are unknown.

    A call that is neither listed nor has an error of its own is EPERM; one that is newer than the table is ENOSYS, on which C
    libraries use an older one.
    """
    if machine not in MACHINES:
        raise OSError(f"no filter of system calls is known for {machine}")
    rules = [(_LOAD, 0, 0, _ARCHITECTURE), (_IS, 1, 0, MACHINES[machine]), _refuse(errno.EPERM)]
    rules += [(_LOAD, 0, 0, _NUMBER), (_FROM, 0, 1, X32), _refuse(errno.EPERM)]
    for number in numbers(_ALLOWED, machine).values():
        rules += [(_IS, 0, 1, number), _ALLOW]  # a jump is by so many instructions if true, so many if false
    for names, values in _BY_ARGUMENT.items():
        (number,) = numbers(names, machine).values()
        rules += [(_IS, 0, 2 * len(values) + 2, number), (_LOAD, 0, 0, _SECOND)]
        for value in values:
            rules += [(_IS, 0, 1, value), _ALLOW]
        rules += [_refuse(errno.EPERM)]
    for code, names in _REFUSED.items():
        for number in numbers(names, machine).values():
            rules += [(_IS, 0, 1, number), _refuse(code)]
    rules += [(_FROM, 0, 1, NEWER), _refuse(errno.ENOSYS), _refuse(errno.EPERM)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def _refuse(code: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, 0x00050000 | code)
