"""The table of system calls against the kernel's own headers, and the filter by an interpreter of its instructions."""

import errno
import re
import struct
from pathlib import Path

import pytest

from rpo.sandbox import syscalls

HEADERS = {
    "x86_64": ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"],
    "aarch64": ["/usr/include/asm-generic/unistd.h"],
}
ALLOW, ERROR = 0x7FFF0000, 0x00050000
DANGEROUS = """
ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open pidfd_getfd pidfd_send_signal tkill rt_sigqueueinfo
rt_tgsigqueueinfo shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_timedsend
memfd_create memfd_secret execve execveat userfaultfd bpf perf_event_open io_uring_setup io_uring_enter io_uring_register
add_key request_key keyctl unshare setns mount umount2 pivot_root chroot move_mount open_tree fsopen fsmount mount_setattr
prctl seccomp landlock_create_ruleset personality timer_create timerfd_create eventfd2 signalfd4 epoll_create1 inotify_init1
fanotify_init splice tee vmsplice sendfile copy_file_range bind connect listen accept sendto sendmsg recvmsg setsockopt
name_to_handle_at open_by_handle_at setxattr mknodat mlock mlockall mlock2 setuid setgid setresuid setgroups capset setrlimit
setsid setpgid sched_setaffinity sched_setscheduler setpriority ioprio_set sync syncfs quotactl reboot swapon init_module
finit_module delete_module kexec_load syslog acct settimeofday clock_settime adjtimex sethostname nfsservctl
flock remap_file_pages mbind migrate_pages move_pages lookup_dcookie modify_ldt iopl ioperm uselib
""".split()


def header(machine):
    """{name: number} by the kernel's header for user programs."""
    path = next((path for path in HEADERS[machine] if Path(path).exists()), None)
    if path is None:
        pytest.skip(f"no kernel header for {machine} here")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\b", Path(path).read_text(), re.MULTILINE)
    own = {name: int(number) for name, number in found}
    if machine == "aarch64":  # whose names the header puts together from others
        own |= {"newfstatat": own["fstatat"]}
    return own


def verdict(machine, number, *args, arch=None):
    """What the filter returns for that call: a plain interpreter of classic BPF."""
    rules = list(struct.iter_unpack("HBBI", syscalls.filter_of(machine)))
    data = struct.pack("<IIQ6Q", number, arch or syscalls.MACHINES[machine], 0, *args, *[0] * (6 - len(args)))
    at = held = 0
    while True:
        code, if_true, if_false, value = rules[at]
        at += 1
        if code == 0x20:
            (held,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            at += if_true if {0x15: held == value, 0x35: held >= value}[code] else if_false


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_numbers_are_the_kernel_s(machine):
    """Every number in the table is its name's; what is said to be missing on a machine is."""
    known = header(machine)
    others = ", ".join(syscalls._REFUSED.values())
    listed = syscalls.allowed(machine) | syscalls.numbers(others, machine)
    assert listed == {name: known.get(name) for name in listed}
    every = ", ".join((syscalls._ALLOWED, *syscalls._BY_ARGUMENT, *syscalls._REFUSED.values()))
    assert not {row.split()[0] for row in every.split(",")} - set(listed) & set(known)


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_dangerous_calls_are_refused(machine):
    """On either machine a call that reaches out of the jail or past its limits is EPERM."""
    known = header(machine)
    there = [name for name in DANGEROUS if name in known]
    assert len(there) > 110
    assert {name: verdict(machine, known[name]) for name in there} == dict.fromkeys(there, ERROR | errno.EPERM)
    for name in ("read", "mmap", "exit_group", "futex", "getrandom"):
        assert verdict(machine, known[name]) == ALLOW
    assert verdict(machine, known["clone"], 0x10F00) == verdict(machine, known["clone3"]) == ERROR | errno.EAGAIN
    assert verdict(machine, known["fsync"]) == verdict(machine, known["msync"]) == ERROR  # 0: as if done
    assert verdict(machine, known["socket"], 40) == ERROR | errno.EAFNOSUPPORT


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_arguments_and_other_ways_in(machine):
    """fcntl and ioctl are allowed by the argument's low half, which is all that the kernel reads; no other ABI is."""
    known = header(machine)
    assert verdict(machine, known["fcntl"], 3, 1) == verdict(machine, known["ioctl"], 0, 0x5401) == ALLOW
    for call, command in (
        ("fcntl", 6),
        ("fcntl", 8),
        ("fcntl", 1031),
        ("fcntl", 1033),
        ("ioctl", 0x5412),
        ("ioctl", 0x541C),
    ):
        assert verdict(machine, known[call], 3, command) == ERROR | errno.EPERM
        assert verdict(machine, known[call], 3, 2**32 + command) == ERROR | errno.EPERM
    for arch in {0x40000003, 0x40000028, *syscalls.MACHINES.values()} - {syscalls.MACHINES[machine]}:  # i386, arm
        assert verdict(machine, known["read"], arch=arch) == ERROR | errno.EPERM
    assert verdict(machine, 0x40000000 + known["read"]) == ERROR | errno.EPERM
    assert verdict(machine, 470) == ERROR | errno.ENOSYS


def test_an_unknown_machine_is_refused():
    """Where no number is known there is no filter, and so no sandbox."""
    with pytest.raises(OSError, match="no filter of system calls is known for riscv64"):
        syscalls.filter_of("riscv64")
