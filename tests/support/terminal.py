"""A program in a pseudo-terminal: keys are sent, and its screen is read."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time

PATIENCE = 120  # seconds; loading alone may take many on a busy machine
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|[\r\n\b\x07]")
UNFINISHED = re.compile(r"\x1b(\[[0-9;?]*)?$")
CTRL_C, CTRL_D = "\x03", "\x04"


class Display:
    """Lines of any length, as a terminal shows them: what is written over or erased is gone."""

    def __init__(self):
        self.lines, self.row, self.column, self.waiting = [""], 0, 0, ""

    def take(self, data):
        data = self.waiting + data
        self.waiting = found[0] if (found := UNFINISHED.search(data)) else ""
        data = data.removesuffix(self.waiting)
        place = 0
        for control in CONTROL.finditer(data):
            self.write(data[place : control.start()])
            self.obey(control[0])
            place = control.end()
        self.write(data[place:])

    def write(self, text):
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
        self.column += len(text)

    def obey(self, control):
        count = int(re.sub(r"\D", "", control) or 0)
        if control == "\n":
            self.row += 1
            self.lines += [""] * (self.row == len(self.lines))
        elif control == "\r":
            self.column = 0
        elif control == "\b" or control[-1] == "D":
            self.column = max(self.column - max(count, 1), 0)
        elif control[-1] == "C":
            self.column += max(count, 1)
        elif control[-1] == "A":
            self.row = max(self.row - max(count, 1), 0)
        elif control[-1] == "K":
            self.lines[self.row] = "" if count == 2 else self.lines[self.row][: self.column]

    def __str__(self):
        return "\n".join(self.lines)


def take_terminal():
    """In the new process: Ctrl-C is a signal to it, which it does not ignore even if the tests do."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`raw` is all that the program has written, `screen` what is to be seen of it."""

    def __init__(self, command, **environment):
        self.master, slave = pty.openpty()
        self.raw, self.display = "", Display()
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = 0  # characters of the screen that were waited for
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"} | environment,
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    @property
    def screen(self):
        return str(self.display)

    def send(self, keys):
        os.write(self.master, keys.encode())

    def line(self, text):
        self.send(text + "\n")

    def wait_for(self, pattern):
        """What the screen shows from the last wait on, up to and with a pattern."""
        end = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.screen, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} on the screen:\n{self.screen}"
            assert self.read(1.0) is not None, f"it ended without {pattern!r}:\n{self.screen}"
        shown = self.screen[self.seen : found.end()]
        self.seen = found.end()
        return shown

    def read(self, seconds):
        """More of what it writes; None where it has ended."""
        if not select.select([self.master], [], [], seconds)[0]:
            return ""
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return None
        text = self.decoder.decode(data)
        self.raw += text
        self.display.take(text)
        return data or None

    def end(self):
        """The exit code, when it has written everything."""
        stop = time.monotonic() + PATIENCE
        while self.read(1.0) is not None:
            assert time.monotonic() < stop, f"it goes on:\n{self.screen}"
        return self.process.wait(PATIENCE)
