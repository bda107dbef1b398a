"""The system calls that no program needs: a filter of the kernel, as bubblewrap loads it.

Refused with EPERM: making processes and threads, signals to any process, tracing and reading other processes,
mounts and namespaces, sockets (socket pairs stay), System V and POSIX message queues, shared memory and semaphores,
keyrings, eBPF, performance counters, io_uring, userfaultfd, device nodes, kernel modules, clocks, the kernel log.
"""

from __future__ import annotations

import platform
import struct

__all__ = ["filter_program"]

# x86-64 and the generic table that aarch64 uses; None: there is no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "mknod": (133, None), "mknodat": (259, 33), "socket": (41, 198), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "sethostname": (170, 161), "setdomainname": (171, 162),
    "personality": (135, 92), "quotactl": (179, 60), "fanotify_init": (300, 262), "lookup_dcookie": (212, 18),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "memfd_secret": (447, 447),
}  # fmt: skip

SERVER = ("clone", "clone3", "fork", "vfork", "kill")
"""What the first process of a sandbox is left, to fork one child for each answer and to end it."""

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
FIRST_X32 = 0x40000000

LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of classic BPF
ALLOW, EPERM, KILL = 0x7FFF0000, 0x00050001, 0x80000000
NUMBER, ARCHITECTURE = 0, 4  # offsets in the data that the filter sees


def filter_program(server: bool = False) -> bytes | None:
    """The filter as an array of `struct sock_filter`, or None on a processor whose numbers are not in the table.

    Args:
        server: Leave `SERVER`, for the process that forks the children.
    """
    if platform.machine() not in ARCHITECTURES:
        return None
    architecture, column = ARCHITECTURES[platform.machine()]
    left = SERVER if server else ()
    numbers = [calls[column] for name, calls in CALLS.items() if name not in left and calls[column] is not None]
    # A call of another architecture's table ends the process: its numbers mean something else.
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    # A jump says how many steps to pass over when true; the last step refuses, the one before it allows.
    checks = [(AT_LEAST, FIRST_X32), *((EQUAL, number) for number in numbers)]
    for index, (kind, value) in enumerate(checks):
        steps.append((kind, len(checks) - index, 0, value))
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]
    return b"".join(struct.pack("HBBI", code, true, false, value) for code, true, false, value in steps)
