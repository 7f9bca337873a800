"""The sandbox: what a program may do works, what it may not is stopped by every lock there is, and the caller never notices more."""

import concurrent.futures
import os
import pathlib
import re
import tempfile
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains import sandbox, sandbox_inside
from a1jax.domains.sandbox import Limits, run

try:
    sandbox.check()
except ConfigError as error:
    pytest.skip(f"no program can be locked in here: {error}", allow_module_level=True)

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
TRY = """
import os
def tried(f, *arguments):
    try:
        f(*arguments)
    except BaseException as error:
        return type(error).__name__
    return "done"
"""


@pytest.mark.parametrize("way", sandbox.WAYS)
def test_a_program_computes_and_keeps_files_in_its_own_folder_and_sees_no_other(way, monkeypatch):
    try:
        run("x = 1", ways=(way,))
    except ConfigError as error:
        pytest.skip(f"this machine does not grant it: {error}")
    monkeypatch.setenv("SECRET", "token")
    there = pathlib.Path(__file__)
    code = f"""{TRY}
import math
print("begun", object())
with open("left.txt", "w") as file:
    file.write("kept")
def solve(x):
    outside = {{
        "read": tried(open, {str(there)!r}), "list": tried(os.listdir, {str(there.parent)!r}), "proc": tried(open, "/proc/self/environ"),
        "write": tried(open, "{there.parent}/x", "w"), "above": tried(os.listdir, "/etc"), "other": tried(open, "/etc/passwd"),
        "folder": tried(os.mkdir, "new"), "link": tried(os.symlink, "/etc/passwd", "p"), "hard": tried(os.link, "left.txt", "l2"),
        "mode": tried(os.chmod, "left.txt", 0o4777), "root": tried(os.chroot, "."), "remove": tried(os.unlink, {str(there)!r}),
    }}
    return [math.sqrt(x), open("in.txt").read(), sorted(os.listdir(".")), outside, "SECRET" in os.environ]
"""
    done = run(code, "solve", [4, 9], {"in.txt": "given"}, ways=(way,))
    assert (done.status, done.error, done.output) == ("ok", "", "begun <object object at 0x>\n")
    assert dict(done.files) == {"in.txt": "given", "left.txt": "kept"}
    for value, root in zip(done.values, (2, 3), strict=True):
        assert value[:3] == [root, "given", ["in.txt", "left.txt"]] and value[4] is False
        assert "done" not in value[3].values(), value[3]
    assert there.exists()


def test_the_first_way_the_machine_grants_is_taken_and_none_is_a_clear_error(monkeypatch):
    with pytest.raises(ConfigError, match="cannot lock a program in.*cannot leave the file system") as error:
        run("x = 1", ways=())
    assert "\n" not in str(error.value)
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        run("x = 1")


OUT = ("socket", "threading", "subprocess", "ctypes", "resource", "signal", "_posixsubprocess")
LOOSE = Limits(modules=(*sandbox.MODULES, *OUT), memory_bytes=512 << 20)


def test_no_process_thread_socket_signal_or_limit_even_when_the_modules_are_there():
    code = f"""{TRY}
import socket, threading, subprocess, ctypes, resource, signal
def solve(x):
    c = ctypes.CDLL(None, use_errno=True)
    def call(*numbers):
        ctypes.set_errno(0)
        if c.syscall(*numbers) == -1:
            raise OSError(ctypes.get_errno(), "refused")
    return {{
        "socket": tried(socket.socket), "pair": tried(socket.socketpair), "unix": tried(socket.socket, socket.AF_UNIX),
        "fork": tried(os.fork), "vfork": tried(subprocess.run, ["/bin/true"]), "exec": tried(os.execv, "/bin/true", ["true"]),
        "thread": tried(threading.Thread(target=print).start), "parent": tried(os.kill, os.getppid(), 9), "self": tried(os.kill, 0, 9),
        "session": tried(os.setsid), "limit": tried(resource.setrlimit, resource.RLIMIT_NOFILE, (16, 16)), "nice": tried(os.nice, 1),
        "pipe": tried(os.mkfifo, "p"), "raw socket": tried(call, {41 if os.uname().machine == "x86_64" else 198}, 2, 1, 0),
        "namespace": tried(call, {272 if os.uname().machine == "x86_64" else 97}, 0x10000000), "ring": tried(call, 425, 8, 0),
        "filter off": tried(call, {157 if os.uname().machine == "x86_64" else 167}, 22, 0, 0),
    }}
"""
    (tries,) = run(code, "solve", [0], limits=LOOSE).values
    assert set(tries) and "done" not in tries.values(), tries
    other = {"thread": "RuntimeError", "limit": "ValueError"}  # what Python makes of EPERM there
    assert {name: kind for name, kind in tries.items() if kind != "PermissionError"} == other


def test_modules_that_were_not_asked_for_are_not_there():
    done = run("import socket")
    assert (done.status, done.error) == ("error", "ModuleNotFoundError: No module named 'socket' (line 1)")


@pytest.mark.parametrize(
    ("code", "status", "within"),
    [
        ("while True: pass", "time", 4),
        ("x = [0] * 10**9", "memory", 3),
        ("x = []\nwhile True: x.append(' ' * 10**6)", "memory", 3),
        ("while True: print('x' * 10**5)", "error", 3),
        ("for i in range(10**6):\n    with open(str(i), 'w') as f: f.write('x')", "disk", 3),
        ("for i in range(30):\n    with open(str(i), 'w') as f: f.write('x' * 90000)", "disk", 3),
        ("f = open('big', 'w')\nfor i in range(10**6): f.write('x' * 1000)", "error", 3),
        ("import os\nwhile True: os.fork()", "error", 3),
        ("import os\nos._exit(0)", "killed", 3),
        ("import sys\nsys.exit(3)", "error", 3),
        ("def f(:", "error", 3),
        ("x = 1\0", "error", 3),
        ("'\ud800'", "error", 3),
        ("(" * 9999, "error", 3),
        ("1/0", "error", 3),
        ("class E(Exception):\n    def __str__(self): return 1/0\nraise E", "error", 3),
        ("raise ValueError('\\ud800\\n' * 999)", "error", 3),
        ("def solve(x): return {1, 2}", "error", 3),
        ("def solve(x): return float('nan')", "error", 3),
        ("solve = 3", "error", 3),
        ("def solve(x): return 'x' * 10**7", "error", 3),
        ("import json\njson.dumps = None\ndef solve(x): return x", "error", 3),
        ("import sys\nsys.stdout = None\n1/0", "error", 3),
        ("x" * 30_000, "error", 3),
    ],
)
def test_what_a_program_does_wrong_ends_the_program_only(code, status, within):
    begun = time.monotonic()
    done = run(code, "solve", [1], limits=Limits(seconds=2.0, cpu_seconds=1))
    assert done.status == status and done.error and "\n" not in done.error and len(done.error) < 350
    assert time.monotonic() - begun < within + 4  # four seconds for a machine that is busy
    done.error.encode("utf-8")
    assert len(done.output) <= Limits().output_chars


def test_a_stopped_program_is_gone_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun = time.monotonic()
    done = run("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)", limits=Limits(seconds=1.5))
    assert done.status == "time" and time.monotonic() - begun < 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.output), 0)
    run("open('x', 'w').write('y')")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_catches_the_signal_of_its_limit_is_killed_a_second_later():
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    begun = time.monotonic()
    assert run(code, limits=Limits(seconds=30.0, cpu_seconds=1, modules=("signal",))).status == "killed"
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize(
    "said", ['{"error": "no lock"}', '{"values": 3, "error": null}', "[" * 5000, "[1e999]", '{"values": [NaN]}', "\\xff"]
)
def test_a_report_that_the_program_wrote_itself_is_read_with_care(said):
    code = f"""
import os
def solve(x):
    for fd in range(3, 32):
        try:
            os.write(fd, {said!r}.encode("latin-1"))
        except OSError:
            pass
    os._exit(0)
"""
    done = run(code, "solve", [1])  # in particular no ConfigError: whether it was locked in is not for the program to say
    assert done.values == () and done.status in ("ok", "error", "killed")


def test_a_program_that_reports_and_then_crashes_is_not_believed():
    code = """
import os
def solve(x):
    for fd in range(3, 32):
        try:
            os.write(fd, b'{"values": [1], "error": ""}')
        except OSError:
            pass
    os._exit(x)
"""
    assert run(code, "solve", [0]) == sandbox.Result("ok", (1,))
    assert run(code, "solve", [3]) == sandbox.Result("killed", error="ended without a report")


def test_same_program_same_result():
    code = "import random\nprint({str(i) for i in range(50)}, random.random(), object(), hash('a'))\ndef solve(x): return random.random()"
    one, two = run(code, "solve", [1, 2]), run(code, "solve", [1, 2])
    assert one == two and len(set(one.values)) == 2


def test_cases_are_json_in_and_out_and_an_error_keeps_what_was_answered():
    done = run("def solve(x):\n    return (x['a'], 1 / (x['a'] - 2))", "solve", [{"a": 1}, {"a": 2}, {"a": 3}])
    assert (done.status, done.values, done.error) == ("error", ([1, -1.0],), "ZeroDivisionError: division by zero (line 2)")


def test_bad_limits_and_file_names_are_refused():
    with pytest.raises(ConfigError, match="sandbox.Limits.seconds"):
        Limits(seconds=0)
    for name in ("../x", "/x", "", ".x", "a/b"):
        with pytest.raises(ConfigError, match="no file name"):
            run("x = 1", files={name: ""})


def test_many_at_once():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda i: run("def f(x): return x * x", "f", [i]).values, range(12)))
    assert done == [(i * i,) for i in range(12)]


@pytest.mark.parametrize("machine", sorted(HEADERS))
def test_the_numbers_of_the_calls_are_the_kernels(machine):
    path = pathlib.Path(HEADERS[machine])
    if not path.exists():
        pytest.skip("the kernel's headers are not installed")
    text = path.read_text()
    names = dict(re.findall(r"#define\s+(__NR3264_\w+)\s+(\d+)", text))
    found = {name: names.get(number, number) for name, number in re.findall(r"#define\s+__NR_(\w+)\s+(\w+)", text)}
    column, _ = sandbox_inside.MACHINES[machine]
    ours = {name: str(numbers[column]) for name, numbers in sandbox_inside.SYSCALLS.items() if numbers[column] is not None}
    assert ours == {name: found.get(name) for name in ours}
    assert len(set(ours.values())) == len(ours) > 40


def test_the_filter_lets_exactly_the_list_pass():
    """The program interpreted by hand, for every number there is and some there are not."""
    for machine, (column, arch) in sandbox_inside.MACHINES.items():
        program = sandbox_inside.filter_program(machine)
        lines = [program[i : i + 8] for i in range(0, len(program), 8)]
        lines = [(int.from_bytes(x[:2], "little"), x[2], x[3], int.from_bytes(x[4:], "little")) for x in lines]
        allowed = {numbers[column] for numbers in sandbox_inside.SYSCALLS.values()} - {None}
        for number in (*range(600), 0x40000000, 0x40000001, 2**32 - 1):
            assert _filtered(lines, number, arch) == (0x7FFF0000 if number in allowed else 0x00050001)
        assert _filtered(lines, 0, 0x40000003) == 0x80000000  # a 32-bit call: the process is killed


def _filtered(lines, number, arch):
    at, value = 0, None
    while True:
        code, yes, no, k = lines[at]
        if code == 0x06:
            return k
        if code == 0x20:
            value, at = {0: number, 4: arch}[k], at + 1
        else:
            at += 1 + (yes if value == k else no)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    code=st.text()
    | st.lists(st.sampled_from(["x", "=", "(", ")", "1", "\n", "    ", "def f():", "'", "raise", "import os", "~"])).map(" ".join)
)
def test_no_text_is_too_strange(code):
    done = run(code, limits=Limits(seconds=5.0, cpu_seconds=1))
    assert done.status in ("ok", "error", "memory", "time") and isinstance(done.error, str)
