"""Programs that want out: name → source. `f()` returns "escaped" where the attempt works, whatever else happens.

`attack.py` fills in what the attacker is after: TRAINER (a process number), PORT and SOCKET (where the trainer listens),
SECRET (a file that the trainer's user can read), FOLDER (one that everybody may write), REPOSITORY.
"""

from __future__ import annotations

__all__ = ["CONTROL", "ESCAPES", "TEST"]

TEST = "assert f() == 'escaped'\n"


def reads(path: str) -> str:
    return f"def f():\n    return 'escaped' if open({path!r}, 'rb').read(100) else ''\n"


def lists(path: str) -> str:
    return f"import os\ndef f():\n    return 'escaped' if os.listdir({path!r}) else ''\n"


def does(code: str, imports: str = "os") -> str:
    """Escapes where the code raises nothing."""
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    return f"import {imports}\ndef f():\n{lines}\n    return 'escaped'\n"


def calls(number: str, arguments: str, success: str = "result >= 0") -> str:
    """A system call by its number on x86-64 and elsewhere."""
    return (
        "import ctypes, platform\nlibc = ctypes.CDLL(None, use_errno=True)\ndef f():\n"
        f"    numbers = {number}\n    number = numbers[0 if platform.machine() == 'x86_64' else 1]\n"
        f"    result = libc.syscall({', '.join(part for part in ('number', arguments) if part)})\n    return 'escaped' if {success} else ''\n"
    )


ESCAPES: dict[str, str] = {
    # Secrets of the trainer.
    "its own environment": "import os\ndef f():\n    return 'escaped' if 'HF_TOKEN' in os.environ else ''\n",
    "the trainer's environment": reads("/proc/TRAINER/environ"),
    "an environment under /proc": (
        "import glob\ndef f():\n    for path in glob.glob('/proc/*/environ'):\n        try:\n            if b'hf_secret' in open(path, 'rb').read():\n                return 'escaped'\n"
        "        except OSError:\n            pass\n    return ''\n"
    ),
    "the trainer's memory": reads("/proc/TRAINER/maps"),
    "a file of the trainer": reads("SECRET"),
    "a file through a symbolic link": does("os.symlink('SECRET', 'link')\nassert open('link').read()"),
    "a file through a hard link": does("os.link('SECRET', 'link')\nassert open('link').read()"),
    "a file through its own folder's parents": reads("/tmp/../../../../..SECRET"),
    "/etc/shadow": reads("/etc/shadow"),
    "/etc/passwd": reads("/etc/passwd"),
    "root's home": lists("/root/.ssh"),
    "homes": lists("/home"),
    "the repository": lists("REPOSITORY"),
    "mounted folders": lists("/mnt"),
    "descriptors that were left open": (
        "import os, stat\ndef f():\n    for n in range(256):\n        try:\n            kind = os.fstat(n).st_mode\n        except OSError:\n            continue\n"
        "        if n > 2 and not stat.S_ISSOCK(kind):\n            return 'escaped'\n    return ''\n"
    ),
    # Other processes.
    "a signal to the trainer": does("os.kill(TRAINER, 0)"),
    "a signal to everything": does("os.kill(-1, 0)"),
    "a signal to its group": does("os.killpg(0, 0)"),
    "a signal to its parent": does("os.kill(os.getppid(), 0)"),
    "a signal to itself": does("os.kill(os.getpid(), 0)"),
    "a descriptor of the trainer's process": calls("(434, 434)", "TRAINER, 0"),
    "ptrace of its parent": calls("(101, 117)", "16, __import__('os').getppid(), 0, 0"),
    "the memory of its parent": calls("(310, 270)", "__import__('os').getppid(), None, 0, None, 0, 0"),
    "a priority above others": does("os.setpriority(os.PRIO_USER, 0, -20)"),
    "a fork": does("if os.fork() == 0:\n    os._exit(0)"),
    "a fork bomb": does("while True:\n    os.fork()"),
    "a thread": does("threading.Thread(target=print).start()", "threading"),
    "another program": does("subprocess.run(['/bin/true'])", "subprocess"),
    # Rights.
    "setuid(0)": does("os.setuid(0)\nassert os.getuid() == 0"),
    "a group of root": does("os.setgroups([0])"),
    "higher limits": does("resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))", "resource"),
    "a user namespace": calls("(272, 97)", "0x10000000"),
    "a mount": calls("(165, 40)", "b'none', b'/tmp', b'tmpfs', 0, None"),
    "an unmount": calls("(166, 39)", "b'/tmp', 0"),
    "chroot": does("os.chroot('/tmp')"),
    "a host name": does("socket.sethostname('mine')", "socket"),
    "a device node": does("os.mknod('disk', 0o60666, os.makedev(254, 0))\nopen('disk', 'rb').read(1)"),
    "the kernel's memory": reads("/dev/mem"),
    "the kernel's log": calls("(103, 116)", "3, ctypes.create_string_buffer(100), 100", "result > 0"),
    "the kernel's settings": does("open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')"),
    "a disk": reads("/dev/vda"),
    "the terminal": does("fcntl.ioctl(os.open('/dev/tty', os.O_RDWR), 0x5412, b'x')", "fcntl, os"),
    "a keyring": calls("(250, 219)", "0, -3, 1"),
    "eBPF": calls("(321, 280)", "0, ctypes.create_string_buffer(72), 72"),
    "io_uring": calls("(425, 425)", "4, ctypes.create_string_buffer(120)"),
    "user faults": calls("(323, 282)", "1"),
    # The network.
    "the trainer's port": does("socket.create_connection(('127.0.0.1', PORT), 1)", "socket"),
    "a socket of the trainer": does("socket.socket(socket.AF_UNIX).connect('SOCKET')", "socket"),
    "an abstract socket of the trainer": does("socket.socket(socket.AF_UNIX).connect('\\0fdiv-PORT')", "socket"),
    "a port of its own": does("socket.create_server(('', 0))", "socket"),
    "a datagram": does("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))", "socket"),
    # What stays behind.
    "a file in a folder of everybody": does("open('FOLDER/left', 'w').write('x')"),
    "a file beside the interpreter": does("open(os.path.dirname(os.__file__) + '/left.py', 'w').write('x')"),
    "a file in the sandbox's code": does("open('/sandbox/inside/left.py', 'w').write('x')"),
    "a file in the root folder": does("open('/left', 'w').write('x')"),
    "shared memory as a file": does("open('/dev/shm/left', 'w').write('x')"),
    "a large file": does("with open('big', 'wb') as file:\n    file.write(b'x' * 5_000_000)"),
    "many files": does(
        "for n in range(40):\n    with open(str(n), 'wb') as file:\n        file.write(b'x' * 1_000_000)"
    ),
    "much memory": does("assert len(bytearray(10**10))"),
    "memory in a file": does("with open(os.memfd_create('big'), 'wb') as file:\n    file.write(b'x' * 5_000_000)"),
    "many descriptors": does("for n in range(100):\n    os.open('/dev/null', os.O_RDONLY)"),
    "a System V segment": calls("(29, 194)", "0x1234, 4096, 0o1666"),
    "a System V semaphore": calls("(64, 190)", "0x1234, 1, 0o1666"),
    "a System V queue": calls("(68, 186)", "0x1234, 0o1666"),
    "a POSIX queue": calls("(240, 180)", "b'left', 0o102, 0o666, None"),
    # Other answers.
    "files of other answers": (
        "import os\ndef f():\n    found = [n for folder, _, names in os.walk('/tmp') for n in names if n.startswith('left-by')]\n    found += os.listdir('.')\n"
        "    open('left-by-me', 'w').write('x')\n    return 'escaped' if found else ''\n"
    ),
    "files of other answers, again": (
        "import os\ndef f():\n    found = os.listdir('.')\n    os.makedirs('a/b')\n    return 'escaped' if found else ''\n"
    ),
    "modules of other answers": (
        "import math, sys\ndef f():\n    found = hasattr(math, 'left_by_me')\n    math.left_by_me = 1\n    return 'escaped' if found else ''\n"
    ),
    "modules of other answers, again": (
        "import math\ndef f():\n    found = hasattr(math, 'left_by_me')\n    math.left_by_me = 1\n    return 'escaped' if found else ''\n"
    ),
}

CONTROL = (
    "its own environment", "the trainer's environment", "an environment under /proc", "the trainer's memory",
    "a file of the trainer", "a file through a symbolic link", "/etc/passwd", "the repository",
    "a signal to the trainer", "a signal to its parent", "a signal to itself", "a fork", "a thread", "another program",
    "the trainer's port", "a socket of the trainer", "an abstract socket of the trainer", "a port of its own",
    "a file in a folder of everybody", "a large file", "many files", "memory in a file", "many descriptors",
    "files of other answers",
)  # fmt: skip
"""Escapes that work and leave nothing outside FOLDER where there is no sandbox."""
