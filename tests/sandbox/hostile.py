"""Programs that mean harm, and how each must end. ``target.json`` tells them where to aim; none is told the labels."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from textwrap import dedent

from reasoner_ray.sandbox.limits import Kind

HARMLESS = ("ok:None",)
"""For programs that end as if nothing were wrong, having got nothing."""

AIM = """
import ctypes, glob, json, os, signal, socket, subprocess, sys, threading, time
with open("target.json") as file:
    target = json.load(file)
loot = open("loot.txt", "a")

def steal(take):
    try:
        loot.write(repr(take()))
        loot.flush()
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Hostile:
    """A program, what it attacks, and the endings (``status:error_type``) that count as contained."""

    name: str
    kind: Kind
    source: str
    ends: tuple[str, ...]

    @property
    def needs_seccomp(self) -> bool:
        """Memory outside of processes, which the weakest level does not count and does not claim to."""
        return self.name in ("memory in files without names", "memory that outlives it")


def _hostile(name: str, kind: Kind, source: str, *ends: str) -> Hostile:
    return Hostile(name, kind, AIM + dedent(source), ends or HARMLESS)


DENIED = "forbidden:PermissionError"

RESOURCES = [
    _hostile("endless loop", "resources", "while True: pass", "timeout:Timeout", "timeout:CpuLimit"),
    _hostile("sleeps for ever", "resources", "time.sleep(10**6)", "timeout:Timeout"),
    _hostile(
        "ignores every signal",
        "resources",
        """
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True: pass
        """,
        "killed:SIGKILL",  # the hard limit of CPU time
        "timeout:Timeout",
    ),
    _hostile("fork bomb", "resources", "while True: os.fork()", "processes:BlockingIOError", "processes:ProcessLimit", "timeout:Timeout"),
    _hostile(
        "fork bomb whose children never leave",
        "resources",
        """
        while True:
            try:
                if os.fork() == 0: signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            except OSError:
                pass
        """,
        "processes:ProcessLimit",
        "timeout:Timeout",
        "timeout:CpuLimit",
    ),
    _hostile(
        "thread bomb",
        "resources",
        "while True: threading.Thread(target=time.sleep, args=(10**6,)).start()",
        "processes:RuntimeError",
        "processes:ProcessLimit",
        "memory:MemoryError",
    ),
    _hostile(
        "daemons in sessions of their own",
        "resources",
        """
        for _ in range(3):
            if os.fork() == 0:
                try: os.setsid()
                except OSError: pass
                if os.fork() == 0:
                    os.closerange(0, 100)
                    time.sleep(10**6)
                os._exit(0)
        """,
    ),
    _hostile(
        "memory bomb", "resources", "hoard = []\nwhile True: hoard.append(bytearray(10**7))", "memory:MemoryError", "memory:MemoryLimit"
    ),
    _hostile("one huge array", "resources", "import numpy\nnumpy.ones(1 << 40)", "memory:MemoryError"),
    _hostile(
        "memory bomb of many processes",
        "resources",
        """
        for _ in range(8): os.fork()  # as many as the limits let through
        hoard = bytearray(os.urandom(1 << 20)) * 150
        time.sleep(10**6)
        """,
        "memory:MemoryLimit",
        "processes:BlockingIOError",
        "processes:ProcessLimit",
    ),
    _hostile("shared memory bomb", "resources", "import mmap\nhoard = mmap.mmap(-1, 1 << 36)", "memory:OSError"),
    _hostile("memory in files without names", "resources", "os.memfd_create('hoard')", DENIED),
    _hostile("memory that outlives it", "resources", "sys.exit(ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) == -1)", "error:SystemExit"),
    _hostile("gigabytes on stdout", "resources", "while True: print('x' * 10**6)", "output:OutputLimit"),
    _hostile("gigabytes on stderr", "resources", "while True: os.write(2, b'x' * 10**6)", "output:OutputLimit"),
    _hostile(
        "gigabytes in a file",
        "resources",
        "file = open('hoard', 'wb')\nwhile True: file.write(bytes(10**6))",
        "output:OSError",
        "output:ScratchLimit",
    ),
    _hostile(
        "gigabytes in many files",
        "resources",
        """
        for index in range(10**6):
            with open(f"hoard{index}", "wb") as file: file.write(bytes(10**7))
        """,
        "output:OSError",
        "output:ScratchLimit",
    ),
    _hostile(
        "a million empty files",
        "resources",
        "for index in range(10**6): open(f'f{index}', 'w').close()",
        "output:OSError",
        "output:ScratchLimit",
    ),
    _hostile(
        "folders too deep to remove",
        "resources",
        """
        for index in range(1500):
            os.mkdir("d"); os.chdir("d")
        os.mkdir("locked", 0)
        """,
        "ok:None",
        "output:ScratchLimit",
    ),
    _hostile("hangs in an exit handler", "resources", "import atexit\natexit.register(time.sleep, 10**6)"),
    _hostile("hangs in a last flush", "resources", "sys.stdout.flush = lambda: time.sleep(10**6)", "timeout:Timeout"),
    _hostile("leaves a thread that never ends", "resources", "threading.Thread(target=time.sleep, args=(10**6,)).start()"),
    _hostile(
        "an exception that hangs when it is shown",
        "resources",
        """
        class Trap(Exception):
            def __str__(self): time.sleep(10**6)
        raise Trap
        """,
        "timeout:Timeout",
    ),
    _hostile("crashes", "resources", "ctypes.string_at(0)", "killed:SIGSEGV"),
    _hostile("raises its own limits", "resources", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "error:ValueError"),
    _hostile("stops itself", "resources", "os.kill(os.getpid(), signal.SIGSTOP)", "timeout:Timeout"),
    _hostile("kills itself", "resources", "os.kill(os.getpid(), signal.SIGKILL)", "killed:SIGKILL"),
    _hostile("kills its group", "resources", "os.killpg(0, signal.SIGKILL)", "killed:SIGKILL"),
    _hostile("leaves at once", "resources", "os._exit(0)"),
]

LABELS = [
    _hostile(
        "labels by frames and garbage",
        "processes",
        """
        import gc
        frame = sys._getframe()
        while frame:
            steal(lambda: frame.f_locals); frame = frame.f_back
        steal(lambda: [thing for thing in gc.get_objects() if isinstance(thing, (str, bytes, list))])
        """,
    ),
    _hostile("labels by the environment", "processes", "steal(lambda: dict(os.environ))"),
    _hostile(
        "labels by descriptors",
        "processes",
        """
        for number in (0, *range(3, 256)):
            steal(lambda: os.read(number, 1 << 20) if number != loot.fileno() else b"")
            steal(lambda: os.pread(number, 1 << 20, 0))
        """,
    ),
    _hostile(
        "labels by /proc",
        "processes",
        """
        for folder in {f"/proc/{target['pid']}", f"/proc/{os.getppid()}", *glob.glob("/proc/[0-9]*")} - {f"/proc/{os.getpid()}"}:
            for name in ("environ", "cmdline", "maps", "fd/0", "root/etc/passwd", f"cwd/{target['file']}", "root" + target["file"]):
                steal(lambda: open(f"{folder}/{name}", "rb").read())
        """,
    ),
    _hostile(
        "labels by the memory of the parent",
        "processes",
        """
        for pid in (target["pid"], os.getppid(), 1):
            with open(f"/proc/{pid}/mem", "rb") as memory:
                memory.seek(target["address"]); loot.write(repr(memory.read(100)))
        """,
        DENIED,
        "error:FileNotFoundError",
    ),
    _hostile(
        "labels by ptrace",
        "processes",
        """
        libc = ctypes.CDLL(None, use_errno=True)
        sys.exit(int(all(libc.ptrace(16, pid, 0, 0) == -1 for pid in (target["pid"], os.getppid()))))
        """,
        "error:SystemExit",
    ),
    _hostile(
        "labels by process_vm_readv",
        "processes",
        """
        libc, room = ctypes.CDLL(None), ctypes.create_string_buffer(100)
        vector = (ctypes.c_void_p * 2)
        mine, theirs = vector(ctypes.addressof(room), 100), vector(target["address"], 100)
        libc.process_vm_readv(target["pid"], mine, 1, theirs, 1, 0)
        loot.write(repr(room.raw))
        """,
    ),
    _hostile(
        "labels by the package",
        "files",
        """
        sys.path[:0] = [target["package"], target["folder"]]
        import reasoner_ray
        """,
        "error:ModuleNotFoundError",
        DENIED,
    ),
    _hostile("labels by their file", "files", "loot.write(open(target['file']).read())", "error:FileNotFoundError", DENIED),
    _hostile(
        "labels by a search of the disk",
        "files",
        """
        for folder in ("/tmp", "/var", "/home", "/root", "/dev/shm", os.path.dirname(target["folder"])):
            for place, _, names in os.walk(folder):
                for name in names:
                    if "labels" in name: steal(lambda: open(os.path.join(place, name), "rb").read())
        """,
    ),
    _hostile("labels by a link as the result", "files", "os.symlink(target['file'], 'result.npy')"),
    _hostile("labels by a hard link", "files", "os.link(target['file'], 'result.npy')", "error:FileNotFoundError", DENIED, "error:OSError"),
    _hostile(
        "labels by shared memory",
        "files",
        """
        steal(lambda: open("/dev/shm/" + target["shared"], "rb").read())
        from multiprocessing import shared_memory
        shared_memory.SharedMemory(name=target["shared"])
        """,
        "error:FileNotFoundError",
        DENIED,
    ),
    _hostile("a pipe as the result", "files", "os.mkfifo('result.npy')"),
]

OUTSIDE = [
    _hostile("opens a socket", "network", "socket.create_connection(('127.0.0.1', target['port']), 2)", DENIED),
    _hostile("looks up a name", "network", "socket.getaddrinfo('example.org', 80)", "error:gaierror", DENIED),
    _hostile("sends a datagram", "network", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))", DENIED),
    _hostile("a socket without a network", "network", "socket.socket(socket.AF_UNIX).connect('\\0' + target['abstract'])", DENIED),
    _hostile(
        "a socket by way of a child",
        "network",
        """
        code = f"import socket; socket.create_connection(('127.0.0.1', {target['port']}), 2)"
        subprocess.run([sys.executable, "-c", code], check=True)
        """,
        "error:CalledProcessError",
    ),
    _hostile("writes into a folder of the host", "files", "open(target['folder'] + '/new', 'w')", DENIED, "error:FileNotFoundError"),
    _hostile("overwrites the labels", "files", "open(target['file'], 'w')", DENIED, "error:FileNotFoundError"),
    _hostile(
        "cuts the labels off",
        "files",
        """
        try: os.truncate(target["file"], 0)
        except OSError: pass
        os.open(target["file"], os.O_RDONLY | os.O_TRUNC)
        """,
        DENIED,
        "error:FileNotFoundError",
    ),
    _hostile("removes the labels", "files", "os.unlink(target['file'])", DENIED, "error:FileNotFoundError"),
    _hostile("opens a file to everybody", "files", "os.chmod(target['file'], 0o777)", DENIED, "error:FileNotFoundError"),
    _hostile(
        "patches the packages",
        "files",
        """
        import numpy
        open(numpy.__file__, "a")
        """,
        DENIED,
        "forbidden:OSError",  # EROFS
    ),
    _hostile("makes a device", "files", "import stat\nos.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))", DENIED),
    _hostile("becomes root", "files", "os.setuid(0) if os.getuid() else os.setuid(1)", DENIED, "error:OSError"),
    _hostile("a world of its own", "files", "sys.exit(ctypes.CDLL(None).unshare(0x10020000) == -1)", "error:SystemExit"),
    _hostile("another root", "files", "os.chroot('.')", DENIED),
]

PARENT = [
    _hostile(
        "kills the parent",
        "processes",
        """
        for pid in (target["pid"], target["bystander"], os.getppid()):
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
                try: os.kill(pid, number)
                except OSError: pass
        """,
    ),
    _hostile(
        "kills whatever it can",
        "processes",
        """
        try: os.kill(-1, signal.SIGKILL)
        except OSError: pass
        time.sleep(10**6)
        """,
        "killed:SIGKILL",
        "timeout:Timeout",
    ),
    _hostile("slows the parent down", "processes", "os.setpriority(os.PRIO_PROCESS, target['bystander'], 19)", DENIED),
    _hostile(
        "starves the parent",
        "processes",
        "import resource\nresource.prlimit(target['bystander'], resource.RLIMIT_AS, (1, 1))",
        DENIED,
        "error:ProcessLookupError",
    ),
    _hostile(
        "signals the parent by way of a pipe",
        "processes",
        """
        import fcntl
        end, _ = os.pipe()
        fcntl.fcntl(end, fcntl.F_SETOWN, target["bystander"])
        """,
        DENIED,
    ),
]

GRADER = [
    _hostile(
        "patches the grader",
        "processes",
        """
        import builtins, numpy
        numpy.load = numpy.mean = json.loads = lambda *_, **__: 1.0
        builtins.sum = builtins.len = lambda *_: 10**9
        """,
    ),
    _hostile(
        "a result that runs when it is loaded",
        "files",
        """
        import numpy, pickle
        class Bomb:
            def __reduce__(self): return os.system, (f"touch {target['folder']}/exploded",)
        with open("result.npy", "wb") as file: numpy.save(file, numpy.array([Bomb()], dtype=object), allow_pickle=True)
        with open("result.json", "wb") as file: pickle.dump(Bomb(), file)
        """,
    ),
    _hostile(
        "a result whose header lies",
        "resources",
        """
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(117) + b"\\n"
        with open("result.npy", "wb") as file: file.write(b"\\x93NUMPY\\x01\\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
        """,
    ),
    _hostile(
        "a result of a gigabyte without content", "resources", "os.truncate(os.open('result.npy', 66), 90 << 20)", "output:OutputLimit"
    ),
    _hostile(
        "lies about its error",
        "resources",
        """
        os.write(3, json.dumps({"type": "ok\\x1b[2J", "message": "\\x1b]0;owned\\x07" * 300, "line": -1, "errno": []}).encode())
        os._exit(3)
        """,
        "error:Unnamed",
    ),
    _hostile(
        "an error that cannot be parsed",
        "resources",
        """
        os.write(3, b"[" * 60000)
        os._exit(3)
        """,
        "error:SystemExit",
    ),
    _hostile("gigabytes as its error", "resources", "while True: os.write(3, b'x' * 10**6)", "output:OutputLimit"),
]

FOREIGN = [
    _hostile(
        "calls of another interface",
        "processes",
        """
        import mmap  # getpid as a 32-bit program would call it, past any filter that only looks at numbers
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes.fromhex("b814000000cd80c3"))
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        """,
        "forbidden:ForbiddenCall",
    )
]

PROGRAMS = [*RESOURCES, *LABELS, *OUTSIDE, *PARENT, *GRADER, *(FOREIGN if platform.machine() == "x86_64" else [])]
