"""The first thing that runs in the sandbox's process: lock the door, then run the program. Started by ``sandbox.run`` by path; stdlib only.

Order: read the order from standard input, set limits, import what the program names, leave the file system, forbid system calls, run.
Every lock is the kernel's, so nothing that Python code can reach (ctypes, gc, frames) opens it again.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys

# What a computation with files in its folder needs and nothing else: no fork, exec, threads, sockets, signals to others, limits,
# folders, links, modes, mounts. All other calls fail with EPERM. (x86_64, aarch64) numbers, tested against the kernel's headers;
# None: the machine has no such call.
SYSCALLS = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "ftruncate": (77, 46),
    "getdents": (78, None), "getcwd": (79, 17), "rename": (82, None), "unlink": (87, None), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "getdents64": (217, 61), "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "faccessat": (269, 48), "pselect6": (270, 72), "renameat2": (316, 276), "getrandom": (318, 278),
    "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH of <linux/audit.h>
NOBODY = 65534
SET_PDEATHSIG, SET_NO_NEW_PRIVS, SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2  # <linux/prctl.h>
CLONE_NEWUSER = 0x10000000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every machine
# <linux/landlock.h>: write file, read file, read folder, remove file, make file, truncate (from version 3 on)
OWN_FOLDER = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8 | 1 << 14

libc = ctypes.CDLL(None, use_errno=True)


def checked(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def filter_program(machine):
    """The seccomp filter as bytes of ``struct sock_filter``: another machine's calls kill, listed ones pass, the rest get EPERM."""
    column, arch = MACHINES[machine]
    numbers = sorted(n[column] for n in SYSCALLS.values() if n[column] is not None)
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [(0x15, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]  # equal: jump to the last line
    lines += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]  # SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_ALLOW
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def forbid_calls():
    program = filter_program(platform.machine())
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    checked(libc.prctl(SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0), "seccomp")


def stop_being_root():
    """Root becomes nobody where its folder was given to nobody; for anyone else nothing changes."""
    if os.geteuid() == 0 and os.stat(".").st_uid == NOBODY:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def leave_by_chroot():
    """The working folder becomes the root of all paths."""
    os.chroot(".")
    os.chdir("/")
    stop_being_root()


def leave_by_namespace():
    """As ``leave_by_chroot`` for an ordinary user: root of a user namespace of its own."""
    stop_being_root()
    checked(libc.unshare(CLONE_NEWUSER), "unshare")
    os.chroot(".")
    os.chdir("/")


def leave_by_landlock():
    """No root, no namespaces: files may be opened in the working folder only (Linux 5.13, where Landlock is switched on)."""
    stop_being_root()
    version = checked(libc.syscall(LANDLOCK_CREATE, None, 0, 1), "landlock")
    handled = {1: 0x1FFF, 2: 0x3FFF}.get(version, 0x7FFF)
    attributes = ctypes.c_uint64(handled)
    rules = checked(libc.syscall(LANDLOCK_CREATE, ctypes.byref(attributes), 8, 0), "landlock")
    folder = os.open(".", os.O_PATH)
    beneath = ctypes.c_char_p(struct.pack("=Qi", OWN_FOLDER & handled, folder))
    checked(libc.syscall(LANDLOCK_ADD, rules, 1, beneath, 0), "landlock")
    checked(libc.syscall(LANDLOCK_RESTRICT, rules, 0), "landlock")
    os.close(rules)
    os.close(folder)


WAYS = {"chroot": leave_by_chroot, "namespace": leave_by_namespace, "landlock": leave_by_landlock}


def lock(order):
    """Raises OSError when the kernel offers none of the ways, or no seccomp: then nothing is run."""
    if platform.machine() not in MACHINES:
        raise OSError(f"no list of system calls for a {platform.machine()} machine")
    for name in order["modules"]:
        with contextlib.suppress(ImportError):  # not in every build; the program is told so when it imports it
            __import__(name)
    limits = {
        "RLIMIT_CPU": order["cpu"],
        "RLIMIT_AS": order["memory"],
        "RLIMIT_FSIZE": order["disk"],
        "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        # One second from SIGXCPU, which a program may catch, to SIGKILL, which it may not.
        resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
    checked(libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    failed = []
    for way in order["ways"]:
        try:
            WAYS[way]()
            break
        except OSError as error:
            failed.append(f"{way}: {error.strerror or error}")
    else:
        raise OSError("cannot leave the file system (" + "; ".join(failed) + ")")
    checked(libc.prctl(SET_PDEATHSIG, 9, 0, 0, 0), "pdeathsig")  # after setuid, which clears it
    forbid_calls()


def line_of(error, name):
    """The last line of the program's own code that the error passed through, 0 if none."""
    line, at = getattr(error, "lineno", None) or 0 if isinstance(error, SyntaxError) else 0, error.__traceback__
    while at is not None:
        line = at.tb_lineno if at.tb_frame.f_code.co_filename == name else line
        at = at.tb_next
    return line


def execute(order):
    """{"values": one per case, "error": "" or one line, "kind": the exception's class}."""
    values, name = [], "<program>"
    try:
        scope = {"__name__": "__main__"}
        exec(compile(order["code"], name, "exec", dont_inherit=True), scope)
        if order["function"]:
            if not callable(scope.get(order["function"])):
                return {"values": [], "error": f"the program defines no function {order['function']}", "kind": "NameError"}
            for case in order["cases"]:
                values.append(json.loads(json.dumps(scope[order["function"]](case), allow_nan=False)))
    except BaseException as error:  # whatever a program raises ends the program, not the report
        kind, line = type(error).__name__, line_of(error, name)
        try:
            text = str(error)
        except BaseException:
            text = ""
        where = f" (line {line})" if line else ""
        return {"values": values, "error": f"{kind}: {text}"[:300] + where, "kind": kind}
    return {"values": values, "error": "", "kind": ""}


def main():
    results, locked = os.fdopen(int(sys.argv[1]), "w"), int(sys.argv[2])
    order = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        lock(order)
    except (OSError, ValueError) as error:
        json.dump({"error": str(error)}, results)
        return
    os.write(locked, b"1")  # into a pipe, which no program can take back or write for itself
    os.close(locked)
    if order["seeded"]:
        import random  # imported by lock: a program that names it gets the same numbers every time

        random.seed(0)
    try:
        text = json.dumps(execute(order))
        if len(text) > order["disk"]:
            text = json.dumps({"values": [], "error": f"the answers are longer than {order['disk']} characters", "kind": "ValueError"})
        results.write(text)
        results.flush()
        sys.stdout.flush()
    finally:
        os._exit(0)  # no traceback through this file, and no exit handlers of the program's


if __name__ == "__main__":
    main()
